"""Decoder layers whose one-token calls are graphs: replayed ones on a GPU, ggml's on the CPU."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.flashinfer_choice import FlashinferKernel
from hybrimoe_plugin.compute.attention.kv_cache import (
    FixedCache,
    GrowingLayer,
    cache_in,
    make_buffer,
)
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.decode.capture import (
    Break,
    Buffers,
    LayerGraphs,
    Noted,
    difference,
    record,
    restore,
    tolerance,
)
from hybrimoe_plugin.decode.cpu_step import Rotation, RowStep, row_step
from hybrimoe_plugin.decode.hooks import Hooks
from hybrimoe_plugin.decode.last_rows import LastRows
from hybrimoe_plugin.decode.shared_graphs import DecodeGraphs
from hybrimoe_plugin.device.cuda_graphs import capture_for
from hybrimoe_plugin.engine.turns import Turns
from hybrimoe_plugin.errors import ConfigError, InputError
from hybrimoe_plugin.operators.attention import FusedAttention, Turn
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.mla import FusedMLA
from hybrimoe_plugin.operators.routers import GateRouter

log = logging.getLogger(__name__)

PROOFS = 2
"""Steps that run eagerly and as graphs and are compared: the second tells whether anything of the
first was frozen.
"""

UNDECIDED = 8
"""Steps on which eager and replayed routers may choose other experts, by a near tie: such a step
proves nothing.
"""

ROOM = 256
"""Tokens in the smallest cache of fixed place; it doubles when it is full, and the layer is
captured again.
"""


class GraphedLayer(DenseOperator):
    """The model's own decoder layer; in decode on a GPU its kernels are launched as one or two
    graphs.

    On a GPU the layer's code is captured as it is, operators in it included: norms, attention on a
    cache of fixed place, router and look-ahead before the experts' call, shared experts and the
    rest after it. Anything else than one token of one sequence without padding, without gradients
    and without foreign hooks runs eagerly, and so does everything once a captured layer does not
    give what the eager one gives. On the CPU such calls are a `RowStep`.

    Stands in for the layer in every respect: its children are the layer's own, and so are names of
    parameters.
    """

    def __init__(
        self, key: str, gguf_loader: Any, config: Any, orig_module: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **{**kwargs, "linears": "plain"})
        if not {"self_attn", "mlp"} <= orig_module._modules.keys():
            raise ConfigError(
                f"{key}: {type(orig_module).__name__} is no decoder layer of attention and MLP"
            )
        rest = {name: value for name, value in kwargs.items() if not name.endswith("_device")}
        settings = Settings.of(rest)
        self.wanted = settings.cuda_graphs != "off"
        self._rows_wanted = settings.cpu_graphs != "off"
        self._context = settings.context
        self._flash = settings.attention != "torch"
        self.graphs: DecodeGraphs | None = None
        self._twin = (orig_module,)  # in a tuple, else it would become a child
        self._modules = (
            orig_module._modules
        )  # the same dict, so that operators inside are seen here too
        self.training = orig_module.training
        self._experts: tuple[HybriMoEExperts, ...] = ()
        """None or one; in a tuple for the same reason."""
        self._hooks = Hooks()
        self._rows: Buffers | None = None
        self._holder: weakref.ref[GrowingLayer] | None = None
        """The sequence whose cache lies in the buffers."""
        self._made: LayerGraphs | None = None
        self._proofs = self._undecided = 0
        self.row_step: RowStep | None = None
        self.last_rows: LastRows | None = None

    # transformers finds layers by class when hidden states are asked for.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        twin = self.__dict__.get("_twin")
        return type(self) if twin is None else type(twin[0])

    def __getattr__(self, name: str) -> Any:
        twin = self.__dict__.get("_twin")
        try:
            return super().__getattr__(name)
        except AttributeError:
            if twin is None:
                raise
            return getattr(twin[0], name)

    def connect(self, graphs: DecodeGraphs) -> None:
        """Use graphs from now on, where attention and router are of a kind that can be captured."""
        inside = list(self.modules())
        self._experts = tuple(module for module in inside if isinstance(module, HybriMoEExperts))
        routers = [
            experts.routers()[0] for experts in self._experts if experts.accelerator is not None
        ]
        attention = self._modules.get("self_attn")
        lean = isinstance(attention, FusedAttention | FusedMLA) and attention.ggml is None
        known = len(routers) == len(self._experts) <= 1 and all(
            isinstance(router, GateRouter) for router in routers
        )
        if not lean or not known:
            log.info(
                "%s: not captured: needs lean attention, a transformers router and an accelerator",
                self.key,
            )
            return
        apart = {module for experts in self._experts for module in experts.modules()}
        gates = [router.gate for router in routers if isinstance(router, GateRouter)]
        self._hooks = Hooks(
            (module for module in inside if module is not self and module not in apart), gates
        )
        self.graphs = graphs
        graphs.layers += 1

    def connect_rows(self, rotations: dict[tuple[Turn, int], Rotation]) -> None:
        """Use ggml's graphs from now on, where the layer can be one. Mutates: `rotations`."""
        self.row_step = row_step(self._twin[0], rotations) if self._rows_wanted else None
        if self.row_step is not None:
            # Router and experts are called as modules, with all their hooks.
            apart = ("mlp.gate.", "mlp.experts.")
            around = [
                module
                for name, module in self.named_modules()
                if name and not f"{name}.".startswith(apart)
            ]
            self._hooks = Hooks(around)

    @property
    def captured(self) -> bool:
        """Whether the next step of the running sequence is a replay."""
        return self.graphs is not None and self._made is not None and self._proofs >= PROOFS

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the layer: [B, T, H] from [B, T, H]. Raises: InputError: other dimensions."""
        if hidden_states.ndim != 3:
            raise InputError(
                f"{self.key}: expected [batch, tokens, width], found {list(hidden_states.shape)}"
            )
        if self.row_step is not None:
            if (
                not args
                and hidden_states.dtype == torch.float32
                and self._one_token(hidden_states, kwargs)
            ):
                return self.row_step(hidden_states, kwargs["position_embeddings"], cache_in(kwargs))
            if not args and self.last_rows is not None and self.last_rows.serve(hidden_states):
                return self.last_rows(hidden_states, **kwargs)
            return self._eager(hidden_states, *args, **kwargs)
        graphs = self.graphs
        if graphs is not None and graphs.refusal is not None:
            self.graphs = graphs = self._made = None
        layer = None if graphs is None or args else self._decoding(hidden_states, kwargs)
        if graphs is None or layer is None:
            return self._eager(hidden_states, *args, **kwargs)
        self._seat(layer)
        if not graphs.show(layer.get_seq_length(), kwargs["position_embeddings"]):
            return self._eager(hidden_states, **kwargs)
        if self._made is not None and not graphs.serves(self._made.kernel):
            self._discard()
        if self._made is None or self._proofs < PROOFS:
            return self._prove(graphs, layer, hidden_states, kwargs)
        output = self._made.run(hidden_states, self._run_experts)
        layer.advance()
        return output.clone() if self._forward_hooks else output  # who watches may keep it

    def _eager(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = self._twin[0](hidden_states, *args, **kwargs)
        return output

    def _one_token(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the call is one that graphs are for."""
        if (
            hidden_states.shape[:2] != (1, 1)
            or kwargs.get("attention_mask") is not None
            or torch.is_grad_enabled()
        ):
            return False
        return not self._hooks.foreign() and kwargs.get("position_embeddings") is not None

    def _decoding(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> GrowingLayer | None:
        """This layer's cache, if the call is one that CUDA graphs are for."""
        if not self._one_token(hidden_states, kwargs):
            return None
        layers, index = getattr(cache_in(kwargs), "layers", ()), int(self.self_attn.layer_idx)
        layer = layers[index] if index < len(layers) else None
        if type(layer) is not GrowingLayer or layer.get_seq_length() == 0:
            return None
        if self._made is not None and _kind(hidden_states) != _kind(self._made.hidden):
            return None
        return layer

    def _seat(self, layer: GrowingLayer) -> None:
        """Put the sequence's cache into this layer's buffers, made or doubled where it does not
        fit.
        """
        buffers, held = self._rows, layer.get_seq_length()
        if buffers is not None and held < buffers[0].shape[2] and layer.lies_in(buffers):
            return
        before = self._holder() if self._holder is not None else None
        if before is not None and before is not layer and before.touches(buffers):
            before.leave()  # another sequence may go on later
        like = layer.keys, layer.values
        if buffers is None or held >= buffers[0].shape[2] or any(map(_differ, buffers, like)):
            room = ROOM
            while room <= held:
                room *= 2
            if held < self._context < room:
                room = self._context  # no more than was left free for it
            buffers = make_buffer(like[0], room), make_buffer(like[1], room)
            self._rows = buffers
            self._discard()
        self._holder = weakref.ref(layer)  # before its move, which may be interrupted
        layer.move(buffers)

    def _discard(self) -> None:
        self._made, self._proofs, self._undecided = None, 0, 0

    def _run_experts(self, broken: Break) -> torch.Tensor:
        answer: torch.Tensor = self._experts[0](*broken.given, broken)
        return answer

    def _prove(
        self,
        graphs: DecodeGraphs,
        layer: GrowingLayer,
        hidden: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Run a step eagerly and as graphs, captured where there are none yet; they stay only if
        both give the same.
        """
        held, buffers = layer.get_seq_length(), self._rows
        assert buffers is not None
        expected, noted = self._noted(hidden, kwargs)
        saved = [buffer.clone() for buffer in buffers]
        problem = ""
        try:
            if self._made is None:
                experts, kernel = next(iter(self._experts), None), self._kernel(graphs, buffers)
                self._made = record(graphs, self._layer(kwargs), hidden, buffers, experts, kernel)
            graphs.show(held, kwargs["position_embeddings"])
            found = difference(self._made, hidden, expected, noted, buffers, saved, held)
            self._undecided = 0 if found.same_choice else self._undecided + 1
            self._proofs += found.same_choice
            if not found.error <= tolerance(hidden.dtype):
                problem = (
                    f"{self.key} differs from its eager twin when it is replayed (relative "
                    f"RMS {found.error:.2g})"
                )
            elif self._undecided > UNDECIDED:
                problem = (
                    f"{self.key} chooses other experts than its eager twin when it is replayed"
                )
        except Exception as raised:  # CUDA, Triton and torch raise many kinds
            problem = f"{self.key} cannot be captured: {' '.join(str(raised).split())[:200]}"
        if problem:
            restore(buffers, saved)
            self._discard()
            if not graphs.without_kernels(problem):
                graphs.refuse(problem)
        return expected

    def _kernel(self, graphs: DecodeGraphs, buffers: Buffers) -> FlashinferKernel | None:
        attention = self._modules["self_attn"]
        assert isinstance(attention, FusedAttention | FusedMLA), "connect() looked at it"
        return graphs.kernel(attention.decode_shape(buffers[0])) if self._flash else None

    def _noted(
        self, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, Noted | None]:
        """The eager result, and what went in and out of the experts."""
        noted: list[Noted] = []

        def note(experts: HybriMoEExperts, given: Any, answer: torch.Tensor) -> None:
            noted.append(Noted(given, answer, experts.routers()[0].scores()))

        hooks = [experts.register_forward_hook(note) for experts in self._experts]
        try:
            return self._eager(hidden, **kwargs), next(iter(noted), None)
        finally:
            for hook in hooks:
                hook.remove()

    def _layer(
        self, kwargs: dict[str, Any]
    ) -> Callable[[torch.Tensor, FixedCache, Any], torch.Tensor]:
        rest = {
            name: value
            for name, value in kwargs.items()
            if name not in ("past_key_values", "position_ids")
        }

        def call(hidden: torch.Tensor, cache: FixedCache, angles: Any) -> torch.Tensor:
            fixed = {"cache": cache, "attention_mask": cache.seen, "position_embeddings": angles}
            return self._eager(hidden, **{**rest, **fixed})

        return call


def connect_layers(model: Any, turns: Turns) -> Callable[[], None]:
    """Let a bound model's graphed layers use graphs, where they are wanted and their device has
    them.

    Args:
        turns: of the model; an interrupted one is cleared up after.

    Returns:
        Takes off what this leaves on the model.

    Mutates: `model`, `turns`.
    """
    last: LastRows | None = None
    shared: dict[torch.device, DecodeGraphs | None] = {}
    rotations: dict[tuple[Turn, int], Rotation] = {}
    for module in model.modules():
        if not isinstance(module, GraphedLayer):
            continue
        module.connect_rows(rotations)
        if module.row_step is not None:
            if module.self_attn.layer_idx == model.config.num_hidden_layers - 1:
                module.last_rows = last = LastRows(model, module)
                turns.clean_up.append(last.forget)
            continue
        if not module.wanted:
            continue
        device = next(module.parameters()).device
        if device not in shared:
            capture = capture_for(device)
            shared[device] = None if capture is None else DecodeGraphs(capture, device)
        graphs = shared[device]
        if graphs is not None:
            module.connect(graphs)
    return lambda: None if last is None else last.remove()


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape[:2], one.shape[3], one.dtype) != (
        other.shape[:2],
        other.shape[3],
        other.dtype,
    )


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
