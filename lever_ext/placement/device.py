"""The accelerator that may compute a part of a target on flash: CUDA, or emulated on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrimoe_plugin.config import parse_bytes
from hybrimoe_plugin.device.machine import cuda_device
from hybrimoe_plugin.device.memory import RESERVE
from hybrimoe_plugin.device.streams import CudaStreams, HostStreams, Streams
from hybrimoe_plugin.errors import ConfigError
from lever_ext.placement.pinned import PinnedBuffers


@dataclass
class TargetDevice:
    """An accelerator, its queues, and what of its memory the target's weights may take."""

    device: torch.device
    streams: Streams
    free_bytes: int
    pins: PinnedBuffers | None = None
    """Registers host buffers; None where copies need no pinned memory."""

    @property
    def label(self) -> str:
        """For messages."""
        return "emulated" if self.device.type == "cpu" else str(self.device)

    def close(self) -> None:
        """Wait for copies, then give back pinned pages."""
        self.streams.synchronize()
        if self.pins is not None:
            self.pins.release()


def make_device(name: str, budget: int | str | None = None) -> TargetDevice | None:
    """The accelerator of that name; None for `cpu`.

    Args:
        name: cpu, cuda, cuda:N, or emulated: the CPU behind the accelerator's interface, for tests.
        budget: bytes or text such as 6GiB of its memory that weights may take; by default what is
            free, less a tenth.

    Raises:
        ConfigError: another name, or an unreadable budget.
        BackendError: CUDA cannot be used here.
    """
    limit = None if budget is None else parse_bytes(budget, "vram_budget")
    if name == "cpu":
        return None
    if name == "emulated":
        if limit is None:
            raise ConfigError(
                "device emulated: has no memory of its own, so vram_budget must say how much it "
                "may take"
            )
        return TargetDevice(torch.device("cpu"), HostStreams(), limit)
    device = cuda_device(name)
    free = int(torch.cuda.mem_get_info(device)[0] * (1 - RESERVE))
    return TargetDevice(
        device=device,
        streams=CudaStreams(device),
        free_bytes=free if limit is None else min(free, limit),
        pins=PinnedBuffers(device),
    )
