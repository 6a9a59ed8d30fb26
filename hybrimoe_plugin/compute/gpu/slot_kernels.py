"""Choose the kernels that compute experts in slots, and the layers that none of them takes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hybrimoe_plugin.cache_folder import cache_dir, usable_triton_cache
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import LayerWeights


def on_cpu(
    kernels: Kernels, fallback: Kernels | None, layers: Sequence[LayerWeights], device: str
) -> tuple[Kernels, dict[int, str]]:
    """(kernels to use, position of each layer that they refuse -> the reason).

    The fallback comes in only where the kernels take no layer at all: it is slow, and one call of
    it would hold up what the others compute fast.

    Args:
        device: for messages.

    Raises:
        BackendError: no kernel takes any of the layers.
    """
    for chosen in (kernels, fallback):
        if chosen is None:
            continue
        reasons = {place: chosen.refusal(weights.spec) for place, weights in enumerate(layers)}
        found = {place: reason for place, reason in reasons.items() if reason is not None}
        if len(found) < len(layers):
            return chosen, found
    raise BackendError(
        f"layer {layers[0].layer}: experts cannot be computed on {device}: {found[0]}"
    )


def staying(found: Mapping[int, str], layers: Sequence[LayerWeights]) -> str:
    """Which layers stay on the CPU and why, for a notice; `found` is what `on_cpu` gives."""
    first = min(found)
    which = f"layer {layers[first].layer}"
    if len(found) > 1:
        which = f"{len(found)} of {len(layers)} layers, such as {which},"
    return f"the experts of {which} stay on the CPU: {found[first]}"


def make_kernels(
    name: str, device: torch.device, tuned: bool = True, activations: str = "auto"
) -> tuple[Kernels, Kernels | None]:
    """(kernels, fallback for layers that they refuse).

    Args:
        name: `triton`, `torch`, or `auto`, which takes Triton on CUDA where it is installed.
        tuned: with the tile sizes that were measured on the device, which must be here then.
        activations: `float`, `int8`, or `auto`, which is int8 where Triton's kernels for that prove
            themselves (`Tunable.prove`). Torch operations emulate int8.

    Raises:
        BackendError: Triton was asked for and cannot be used.
    """
    on_cuda = device.type == "cuda"
    installed = importlib.util.find_spec("triton") is not None
    if name == "torch" or (name == "auto" and not (on_cuda and installed)):
        return TorchKernels(int8=activations == "int8"), None
    if not installed:
        raise BackendError(
            "kernels: triton was asked for, but Triton is not installed: pip install triton"
        )
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            "kernels: triton was asked for, but without a CUDA device they run only in Triton's "
            "interpreter: set TRITON_INTERPRET=1 before the program starts (slow, for tests)"
        )
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    if on_cuda and tuned:
        usable_triton_cache()
    path = _tuned_path(device) if tuned else None
    fused = TritonKernels(device, tuned=path, activations=activations)
    return fused, TorchKernels(int8=activations == "int8") if name == "auto" else None


def _tuned_path(device: torch.device) -> Path | None:
    """Where tile sizes for this kind of device are kept."""
    if device.type != "cuda":
        return None
    version = importlib.metadata.version("triton")
    facts = f"{torch.cuda.get_device_name(device)} triton {version}"
    digest = hashlib.sha256(facts.encode()).hexdigest()
    return cache_dir() / "kernels" / f"{digest[:20]}.json"
