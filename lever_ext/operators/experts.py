"""The operator that rules name in place of a target's routed experts.

They live on flash; the promising ones are cached in DRAM.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.activation import activate
from hybrimoe_plugin.compute.gradients import outside_autograd
from hybrimoe_plugin.errors import BackendError, FlashError
from hybrimoe_plugin.operators.expert_form import read_form
from hybrimoe_plugin.operators.experts import layer_of
from hybrimoe_plugin.operators.routers import GateRouter
from lever_ext.flash.experts import FlashExpertCache, Predict
from lever_ext.flash.pack import FlashPack, Tensors
from lever_ext.flash.plan import packed_tensors
from lever_ext.operators.decoder import check_flash_kwargs, check_is_pack
from lever_ext.operators.linear import linear
from lever_ext.operators.transfer import CPU

MATRICES = ("gate_up_proj", "down_proj")
BIASES = ("gate_up_proj_bias", "down_proj_bias")
"""What transformers' experts modules hold, a row for each expert."""


class FlashExperts(nn.Module):
    """Routed experts of one layer (operator contract). Only experts that a token chose are read.

    Args:
        key: qualified module name, e.g. `model.layers.3.mlp.experts`.
        gguf_loader: the open flash pack.
        config: the model's configuration.
        orig_module: the module that this one replaces; its form is taken over.
        prefill_device, generate_device: cpu or auto.

    Raises:
        ConfigError: a device other than the CPU, or the name of the module holds no layer's number.
        FlashError: `gguf_loader` is no flash pack.
        BackendError: the original's experts compute something else.
    """

    def __init__(
        self,
        key: str,
        gguf_loader: FlashPack,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str = "cpu",
        generate_device: str = "cpu",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_flash_kwargs(
            {"prefill_device": prefill_device, "generate_device": generate_device, **kwargs}
        )
        check_is_pack(key, gguf_loader)
        self.form = read_form(key, orig_module)
        stacked = packed_tensors(orig_module)
        known = {*MATRICES, *(BIASES if self.form.has_biases else ())}
        if stacked.keys() != known:
            raise BackendError(
                f"{key}: experts of {type(orig_module).__name__} are not supported on flash: they "
                f"have {', '.join(sorted(stacked))}, and {', '.join(sorted(known))} are expected"
            )
        self.key = key
        self.pack = gguf_loader
        self.config = config
        self.shapes = {f"{key}.{name}": tuple(value.shape[1:]) for name, value in stacked.items()}
        """Qualified name -> shape of one expert's part."""
        self.layer_index = layer_of(key)
        self._cache: FlashExpertCache | None = None
        self._router: GateRouter | None = None
        self._next_router: GateRouter | None = None
        self._position = -1
        """Of this layer among the MoE layers."""
        self._device = CPU
        self._sends_weights = False

    @staticmethod
    def check_kwargs(kwargs: Mapping[str, Any]) -> None:
        """Raises: ConfigError: a device other than the CPU, or an unknown argument."""
        check_flash_kwargs(kwargs)

    def load(self) -> None:
        """Check that the pack's experts are these; nothing is read.

        Raises:
            FlashError: an expert is missing or has another shape.
        """
        blocks = [block for block in self.pack.blocks("expert") if block.layer == self.layer_index]
        fits = bool(blocks)
        for block in blocks:
            found = {tensor.name: tensor.shape for tensor in block.tensors}
            fits = fits and found == self.shapes
        if not fits:
            raise FlashError(
                f"{self.pack.path}: {self.key} does not fit the model; the pack was made from "
                f"another one"
            )

    def bind(
        self,
        cache: FlashExpertCache,
        router: GateRouter | None,
        next_router: GateRouter | None,
        accelerator: torch.device | None = None,
    ) -> None:
        """Connect to the target's expert cache. Mutates.

        Args:
            cache: shared by all layers.
            router: of this layer; its scores rank experts.
            next_router: of the next MoE layer where its weights are resident; it says what to
                prefetch.
            accelerator: computes experts, sent there one by one; None for the CPU, whatever
                computes the layer.
        """
        self._cache = cache
        self._router = router
        self._next_router = next_router
        self._device = accelerator or CPU
        self._sends_weights = accelerator is not None
        self._position = cache.layers.index(self.layer_index)

    def serve_from(self, cache: FlashExpertCache) -> None:
        """Take experts from another cache of the same pack from now on. Mutates."""
        self._cache = cache

    def recover(self) -> None:
        """Clear what a pass that was cut off has left, once no read is in flight. Mutates."""
        for router in (self._router, self._next_router):
            if router is not None:
                router.recover()
        if self._cache is not None:
            self._cache.recover()

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The experts' weighted sum, [T, H].

        Args:
            hidden_states: [T, H].
            top_k_index: ids of the model's own router, [T, K].
            top_k_weights: its weights, [T, K].

        Raises:
            BackendError: not bound to a cache. Going backward through the result raises it too.
            FlashError: an expert cannot be read.
        """
        if torch.is_grad_enabled():
            call = functools.partial(self.forward, hidden_states, top_k_index, top_k_weights)
            return outside_autograd(self.key, call, hidden_states, top_k_weights)
        if self._cache is None:
            raise BackendError(
                f"{self.key}: not bound to an expert cache; use lever_ext.target.load_target"
            )
        hidden = hidden_states.to(self._device)
        ids = top_k_index.to(self._device)
        weights = top_k_weights.to(self._device)
        result = torch.zeros_like(hidden)

        def compute(expert: int, tensors: Tensors) -> None:
            tokens, places = torch.where(ids == expert)
            value = self.compute(hidden[tokens], self._sent(tensors))
            weighted = value * weights[tokens, places, None]
            result.index_add_(0, tokens, weighted.to(result.dtype))

        scores = None if self._router is None else self._router.scores()
        predict = self._prediction(hidden_states)
        self._cache.run(self._position, ids, weights, scores, compute, predict)
        return result.to(hidden_states.device)

    def compute(self, hidden: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """One expert's result [T, H] for hidden states [T, H], not yet weighted."""
        gate, up = self.form.halves(self._map("gate_up_proj", hidden, tensors), dim=-1)
        inner = activate(gate, up, self.form.activation)
        return self._map("down_proj", inner, tensors)

    def _map(self, name: str, value: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """One of an expert's linear maps."""
        weight = tensors[f"{self.key}.{name}"]
        bias = tensors.get(f"{self.key}.{name}_bias")
        return linear(value, weight.t() if self.form.is_transposed else weight, bias)

    def _prediction(self, hidden: torch.Tensor) -> Predict | None:
        """What the next MoE layer's router says about hidden states [T, H], when it is asked."""
        router = self._next_router
        if router is None or not router.predicts:
            return None

        def predict() -> torch.Tensor:
            device = next(router.gate.parameters()).device
            return router.predict(hidden.to(device))

        return predict

    def _sent(self, tensors: Tensors) -> Tensors:
        """An expert's weights where it is computed.

        All there when this returns: their slot may be read into then.
        """
        if not self._sends_weights:
            return tensors
        return {name: tensor.to(self._device, copy=True) for name, tensor in tensors.items()}
