"""The experts operator for kTransformers' rules: our class, of a type that its MoE blocks accept.

Importing this imports `ktransformers`; where that was not compiled, `patches` come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.operators.experts import KExpertsBase
from torch import nn

from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.hosts.ktransformers.adapter import NO_GRAPHS, Shared
from hybrimoe_plugin.operators import experts


class HybriMoEExperts(experts.HybriMoEExperts, BaseInjectedModule, KExpertsBase):
    """Our experts operator under kTransformers' injection; arguments are the same.

    kTransformers loads only what is a `BaseInjectedModule`, and its blocks call only what is a
    `KExpertsBase` with `generate_experts`. Nothing of these base classes is used but the types.
    """

    # Theirs hand every unknown attribute on to the replaced module.
    __getattr__ = nn.Module.__getattr__
    __setattr__ = nn.Module.__setattr__

    _shared: Shared

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module | None = None,
        **kwargs: Any,
    ):
        shared = Shared.of(gguf_loader)
        here = "cuda" if torch.cuda.is_available() else "cpu"
        devices = {"prefill_device": here, "generate_device": here}
        super().__init__(key, shared.store, config, orig_module, **{**devices, **kwargs})
        self._shared = shared
        shared.join(self)

    @property
    def generate_experts(self) -> HybriMoEExperts:
        """Their blocks choose a path by this; without `submit_for_one_decode`, the plain one."""
        return self

    @property
    def device(self) -> str:
        """Where their blocks send inputs: the device of the model's dense part.

        The engine moves them on from there.
        """
        if not torch.cuda.is_available():  # an emulated accelerator is no place to send anything
            return "cpu"
        return self.generate_device if self.generate_device != "cpu" else self.prefill_device

    @staticmethod
    def check_kwargs(kwargs: Mapping[str, Any]) -> None:
        """As the base class, without `auto`, which kTransformers would take for a device's name.

        Raises:
            ConfigError: naming field, value and allowed range.
        """
        for name in ("prefill_device", "generate_device"):
            if kwargs.get(name) == "auto":
                raise ConfigError(
                    f"{name}: kTransformers knows no device auto: name cpu, cuda or cuda:N"
                )
        experts.HybriMoEExperts.check_kwargs(kwargs)

    def forward(  # type: ignore[override]  # their names, and nobody there predicts for us
        self, input_tensor: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] from states [T, H], ids [T, K] and weights [T, K]; builds the engine if needed.

        Raises:
            BackendError: in the capture of a CUDA graph.
        """
        if input_tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            raise BackendError(NO_GRAPHS)
        return self.in_turn(super().forward, input_tensor, expert_ids, weights)

    def in_turn(self, call: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
        """Call while no other thread computes with the model; builds the engine if needed.

        Raises as `Shared.in_turn`.
        """
        return self._shared.in_turn(call, *args)

    def show_router(self, gate: nn.Module, top_k: int) -> None:
        self._shared.show_router(self, gate, top_k)

    def set_inference_mode(self, mode: Any) -> None:
        """Part of layer-wise prefill, which the engine does not need: it plans prefill itself."""

    def unload(self) -> None:
        """Part of their contract; the engine's memory goes with the model."""
