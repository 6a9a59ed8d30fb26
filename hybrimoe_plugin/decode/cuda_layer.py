"""A decoder layer whose one-token calls are CUDA graphs, once these have proved right."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.decode_attention import AttentionKernel
from hybrimoe_plugin.compute.attention.kv_cache import (
    CACHE_NAMES,
    Buffers,
    FixedCache,
    GrowingLayer,
    cache_in,
    cache_name,
)
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.decode.capture import CallLayer, Experts, LayerGraphs, record
from hybrimoe_plugin.decode.chain.link import LayerLink
from hybrimoe_plugin.decode.chain.proof import ChainCall, ProvenChain
from hybrimoe_plugin.decode.comparison import (
    UNDECIDED,
    EagerStep,
    ExpertsCall,
    difference,
    restore,
    tolerance,
)
from hybrimoe_plugin.decode.decode_state import DecodeState
from hybrimoe_plugin.decode.foreign_hooks import ForeignHooks, hooks_on_all
from hybrimoe_plugin.decode.layer_buffers import LayerBuffers
from hybrimoe_plugin.decode.layer_call import EagerLayer, LayerCall, is_plain
from hybrimoe_plugin.operators.attention import AttentionOperator
from hybrimoe_plugin.operators.experts import HybriMoEExperts

PROOFS = 2
"""Steps that run both eagerly and as graphs, and are compared.

The second one tells whether the graphs have frozen anything of the first.
"""


class CudaLayer:
    """A decode step as graphs, any other call eagerly.

    The layer's code is captured as it is, with the operators in it (`decode.capture`). Graphs are
    used only after they gave what the eager twin gives:

        first step    runs eagerly and gives the result; captured, replayed, compared
        second step   runs eagerly and gives the result; replayed, compared
        later steps   replayed, as a part of a chain once that has proved right (`decode.chain`)

    It begins anew when the cache is full and continues in new buffers. After a comparison that
    failed, this layer runs eagerly; the others are not concerned.

    Args:
        key: qualified name of the layer.
        attention: the layer's.
        experts: the layer's, if it has any.
        hooks: of all modules inside the layer but the experts, which are called as a module.
        output_hooks: those on the layer itself; not empty where something may keep its output.
        link: of a layer with experts that may be part of a chain.

    Attributes:
        others: what serves calls of another form than one token's.
    """

    def __init__(
        self,
        key: str,
        eager: EagerLayer,
        attention: AttentionOperator,
        experts: HybriMoEExperts | None,
        hooks: ForeignHooks,
        output_hooks: Sized,
        state: DecodeState,
        settings: Settings,
        link: LayerLink | None = None,
    ) -> None:
        self.experts = experts
        self.buffers = LayerBuffers(settings.context)
        self.others: LayerCall = eager
        self._key = key
        self._eager = eager
        self._attention = attention
        self._hooks = hooks
        self._experts_hooks = ForeignHooks([] if experts is None else experts.modules())
        self._output_hooks = output_hooks
        self.state = state
        self._link = link
        self.chain: ProvenChain | None = None
        """Of this layer and those beside it; None where each is replayed by itself."""
        self.next_input_hooks: Sized | None = None
        """Hooks that see this layer's output before the chain's next layer; None: it has no next.
        """
        self._plain_attention = settings.attention == "torch"
        self._source: torch.Tensor | None = None
        """An output of the layer before in the chain, of the kind that the graphs take."""
        self._graphs: LayerGraphs | None = None
        self._proofs = 0
        self._undecided = 0
        self._refused = False

    @property
    def captured(self) -> bool:
        return self._graphs is not None and self._proofs >= PROOFS

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        cache = None if args or self._refused else self._cache_of(hidden_states, kwargs)
        if cache is None:
            self.state.settle()
            return self.others(hidden_states, *args, **kwargs)
        self.buffers.take(cache)
        held = cache.get_seq_length()
        if not self.state.set_step(held, kwargs["position_embeddings"]):
            self.state.settle()
            return self._eager(hidden_states, **kwargs)
        graphs = self._current_graphs()
        if graphs is None or self._proofs < PROOFS:
            self.state.settle()
            return self._prove(cache, hidden_states, kwargs)
        output = self._replay(graphs, hidden_states, held)
        cache.advance()
        return output.clone() if self._output_hooks else output

    @property
    def can_join(self) -> bool:
        """Whether it may be part of a chain: the host need not plan every call."""
        return self.experts is None or self._link is not None

    def join(self, chain: ProvenChain) -> None:
        """Run as a part of a chain from now on."""
        self.chain = chain
        self.state.chains = list(dict.fromkeys((*self.state.chains, chain)))

    def _replay(self, graphs: LayerGraphs, hidden: torch.Tensor, held: int) -> torch.Tensor:
        """As part of the chain, or by itself; of present slots, as `_current_graphs` has seen."""
        chain = self.chain
        # A chain does not call the experts where nothing misses.
        if chain is None or not self.can_join or self._experts_hooks.present():
            self.state.settle()
            return graphs.run(hidden, self._call_experts)
        if hidden is not self._source:
            self._source = hidden if chain.gave(hidden) else None
        final = self.next_input_hooks is None or hooks_on_all()
        final = final or bool(self.next_input_hooks or self._output_hooks)
        call = ChainCall(graphs, self._call_experts, self._link, held, final)
        return chain.run(call, hidden)

    def _cache_of(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> GrowingLayer | None:
        """This layer's cache; None if the call is not one that CUDA graphs serve."""
        if not is_plain(kwargs) or not self._is_ours(hidden_states) or self._hooks.present():
            return None
        layers = getattr(cache_in(kwargs), "layers", ())
        index = self._attention.layer_idx
        cache = layers[index] if index < len(layers) else None
        holds_some = type(cache) is GrowingLayer and cache.get_seq_length() > 0
        return cache if holds_some else None

    def _is_ours(self, hidden_states: torch.Tensor) -> bool:
        """Whether hidden states are a step's, and of the kind that the graphs take."""
        if hidden_states is self._source:
            return True
        if self._graphs is None:
            return hidden_states.shape[:2] == (self.state.batch, 1)
        return _kind(hidden_states) == _kind(self._graphs.hidden)

    def _current_graphs(self) -> LayerGraphs | None:
        """The graphs, if they are of the present buffers and kernel; else they are discarded."""
        graphs = self._graphs
        if graphs is None:
            return None
        same_slots = self._link is None or self._link.usable
        same_buffers = graphs.buffers is self.buffers.kv
        if same_slots and same_buffers and self.state.still_plans(graphs.kernel):
            return graphs
        self._discard()
        return None

    def _discard(self) -> None:
        self._graphs = self._source = None
        self._proofs = 0
        self._undecided = 0

    def _call_experts(self, call: Experts) -> torch.Tensor:
        assert self.experts is not None
        output: torch.Tensor = self.experts(*call.inputs, call)
        return output

    def _prove(
        self, cache: GrowingLayer, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Run a step eagerly and as graphs, which are captured where there are none yet.

        They stay only if both give the same. The result is the eager one's.
        """
        buffers = self.buffers.kv
        assert buffers is not None, "a sequence lies there"
        eager = self._run_eagerly(cache.get_seq_length(), hidden, kwargs)
        saved: Buffers | None = None
        try:
            keys, values = buffers
            saved = keys.clone(), values.clone()
            problem = self._compare(eager, saved, kwargs)
        except Exception as raised:  # CUDA, Triton and torch raise many kinds
            problem = _reason(self._key, raised)
        if problem:
            if saved is not None:
                restore(buffers, saved)
            self._discard()
            # Tried again with torch's attention, where another kernel was used.
            if not self.state.drop_kernels(problem):
                self._refuse(problem)
        return eager.output

    def _refuse(self, problem: str) -> None:
        """Run eagerly from now on."""
        self._refused = True
        self.state.note_refusal(problem)

    def _run_eagerly(self, held: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> EagerStep:
        """The step as the eager twin runs it, with what goes in and out of the experts."""
        calls: list[ExpertsCall] = []

        def keep_call(experts: HybriMoEExperts, inputs: Any, output: torch.Tensor) -> None:
            router, _ = experts.routers()
            calls.append(ExpertsCall(inputs, output, router.scores()))

        hook = None if self.experts is None else self.experts.register_forward_hook(keep_call)
        try:
            output = self._eager(hidden, **kwargs)
        finally:
            if hook is not None:
                hook.remove()
        return EagerStep(hidden, output, calls[0] if calls else None, held)

    def _compare(self, eager: EagerStep, saved: Buffers, kwargs: dict[str, Any]) -> str:
        """Capture where needed, replay an eager step, and count it; the problem, "" without one.

        Args:
            saved: copies of the KV cache as the eager step left it.

        Raises:
            Exception: of any kind, if the layer cannot be captured.
        """
        if self._graphs is None:
            buffers = self.buffers.kv
            assert buffers is not None, "a sequence lies there"
            kernel = self._kernel_for(buffers)
            self._graphs = record(
                self.state,
                self._with_fixed_cache(kwargs),
                eager.hidden,
                buffers,
                self.experts,
                kernel,
                self._link,
            )
            if self.chain is not None:
                self.chain.renew(self._link)
        self._set_step(eager.held, kwargs)
        found = difference(self._graphs, eager, saved)
        if found.same_choice:
            self._proofs += 1
            self._undecided = 0
        else:
            self._undecided += 1
        if not found.error <= tolerance(eager.hidden.dtype):
            return (
                f"{self._key} differs from its eager twin when it is replayed (relative "
                f"RMS {found.error:.2g})"
            )
        if self._undecided > UNDECIDED:
            return f"{self._key} chooses other experts than its eager twin when it is replayed"
        return ""

    def _set_step(self, held: int, kwargs: dict[str, Any]) -> bool:
        """As `DecodeState.set_step`, from a call's arguments."""
        return self.state.set_step(held, kwargs["position_embeddings"])

    def _kernel_for(self, buffers: Buffers) -> AttentionKernel:
        keys, _ = buffers
        shape = self._attention.decode_shape(keys)
        return self.state.kernel_for(shape, self._plain_attention)

    def _with_fixed_cache(self, kwargs: dict[str, Any]) -> CallLayer:
        """The eager layer, with a step's other arguments, on a fixed-address cache."""
        replaced = (*CACHE_NAMES, "position_ids")
        others = {name: value for name, value in kwargs.items() if name not in replaced}
        keyword = cache_name(self._eager.module)

        def call(hidden: torch.Tensor, cache: FixedCache, embeddings: Any) -> torch.Tensor:
            fixed = {
                keyword: cache,
                "attention_mask": None,  # the cache's kernel knows what a token sees
                "position_embeddings": embeddings,
            }
            return self._eager(hidden, **{**others, **fixed})

        return call


def _reason(key: str, raised: Exception) -> str:
    reason = " ".join(str(raised).split())[:200]
    return f"{key} cannot be captured: {reason}"


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
