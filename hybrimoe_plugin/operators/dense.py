"""The base of operators for dense modules, and when their matrices stay quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.weights.gguf_store import GGUFStore


class DenseOperator(nn.Module):
    """An operator for a module other than routed experts (kTransformers' operator contract).

    Args:
        key: qualified module name.
        gguf_loader: the open weights.
        config: the model's configuration.
        orig_module: the module that this one replaces.
        prefill_device: cpu, cuda, cuda:N or auto.
        generate_device: the same for calls of one token.
        settings: fields of `Settings`; `dense` counts here.

    Attributes:
        ggml: kernels for quantised matrices on the CPU; None where the dense part lies on an
            accelerator or is plain.
        on_device: matrices stay quantised in accelerator memory.
    """

    is_dense = True
    """With `dense: plain` the model keeps its own modules where rules name such an operator."""
    plain_class: type[nn.Module] | None = None
    """The class that it computes the same as. Others, also ones made from it, keep their module."""
    keeps_latents = False
    """Whether it is attention whose cache holds latents in place of keys and values."""
    by_proof = False
    """Whether it replaces only modules that are shown to compute the same (`operators.proof`).

    An operator with `reason_against` shows it itself.
    """
    uses: tuple[str, ...] = ("dense",)
    """Settings that count here, for `hybrimoe explain`."""

    def __init__(
        self,
        key: str,
        gguf_loader: GGUFStore,
        config: Any,
        orig_module: nn.Module | None = None,
        prefill_device: str = "auto",
        generate_device: str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.check_kwargs(
            {"prefill_device": prefill_device, "generate_device": generate_device, **settings}
        )
        if orig_module is None:
            raise ConfigError(f"{key}: the operator needs the module that it replaces")
        self.key = key
        self.generate_device = generate_device
        chosen = Settings.of(settings)
        self.ggml = stored_kernels(gguf_loader, chosen, prefill_device, generate_device)
        self.on_device = self.ggml is None and chosen.dense == "quantised"

    @staticmethod
    def check_kwargs(kwargs: Mapping[str, Any]) -> None:
        """Raises: ConfigError: naming field, value and allowed range."""
        HybriMoEExperts.check_kwargs(kwargs)

    def extra_repr(self) -> str:
        return (
            f"key={self.key!r}, "
            f"matrices={'plain' if self.ggml is None and not self.on_device else 'as stored'}"
        )


def stored_kernels(
    store: GGUFStore | None, settings: Settings, prefill: str, generate: str
) -> Ggml | None:
    """Kernels for quantised matrices, where settings ask for them and the dense part is on the CPU.

    The first operator on a store makes them; all others share them.

    Raises:
        BackendError: asked for, and kt-kernel's ggml cannot be used.
    """
    asked = settings.dense == "quantised"
    if settings.dense == "dequantised" or (settings.cpu_backend == "torch" and not asked):
        return None
    if not (_is_cpu(prefill) and _is_cpu(generate)):
        return None
    try:
        return shared_kernels(store, settings)
    except BackendError:
        if asked:
            raise
        return None


def shared_kernels(store: GGUFStore | None, settings: Settings) -> Ggml:
    """The ggml kernels, with one team of threads, for everything that reads this store.

    `cpu_backend: ggml` asks for ggml's own graphs, which the compiled operations else replace.

    Raises:
        BackendError: kt-kernel's ggml cannot be used.
    """
    make = _graphs_alone if settings.cpu_backend == "ggml" else Ggml
    return make() if store is None else store.companion(make)


def _graphs_alone() -> Ggml:
    return Ggml(operations=False)


def _is_cpu(device: str) -> bool:
    if device == "auto":
        return cuda_refusal() is not None
    return device == "cpu"
