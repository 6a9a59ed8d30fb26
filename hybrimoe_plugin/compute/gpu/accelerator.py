"""The accelerator that a setting names."""

from __future__ import annotations

import torch

from hybrimoe_plugin.compute.gpu.host_bytes import RegisteredBytes, StagedBytes
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.compute.gpu.slot_kernels import make_kernels
from hybrimoe_plugin.compute.gpu.slot_transfers import AHEAD_DEPTH
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.device.streams import CudaStreams
from hybrimoe_plugin.errors import BackendError


def make_accelerator(
    name: str,
    device: torch.device,
    kernels: str = "auto",
    ahead_depth: int = AHEAD_DEPTH,
    activations: str = "auto",
) -> SlotAccelerator | None:
    """The accelerator of a setting; None for `none`.

    Args:
        name: `none`, `emulated` or `cuda`.
        device: where CUDA computes.
        kernels: `auto`, `triton` or `torch`.
        ahead_depth: as in `SlotAccelerator`.
        activations: `auto`, `float` or `int8`.

    Raises:
        BackendError: the device or the kernels cannot be used, with the reason.
    """
    if name == "none":
        return None
    if name == "emulated":
        device = torch.device("cpu")
        chosen, fallback = make_kernels(kernels, device, activations=activations)
        return SlotAccelerator(
            device, "emulated", chosen, fallback=fallback, ahead_depth=ahead_depth
        )
    reason = cuda_refusal()
    if reason is not None:
        raise BackendError(f"accelerator {name} on {device}: {reason}")
    chosen, fallback = make_kernels(kernels, device, activations=activations)
    streams = CudaStreams(device)
    host = RegisteredBytes(device, StagedBytes(streams, slow=True))
    return SlotAccelerator(device, "cuda", chosen, streams, host, fallback, ahead_depth)
