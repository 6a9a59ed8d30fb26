"""Registers the flash store's buffers with CUDA, so that copies run at the link's full speed."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from hybrimoe_plugin.compute.gpu.host_bytes import register_pages
from lever_ext.flash.reader import Buffer

logger = logging.getLogger(__name__)

PORTABLE = 1
"""cudaHostRegisterPortable: every device may copy from the pages."""


class PinnedBuffers:
    """Registers the very memory that direct reads fill, so that nothing is copied on the host.

    Args:
        device: the CUDA device that copies from the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[int, Buffer] = {}

    def add(self, buffers: Iterable[Buffer]) -> None:
        """Register buffers. Mutates.

        Where the driver refuses, a warning says so: copies from those buffers block the host.
        """
        refused = 0
        for buffer in buffers:
            start, nbytes = buffer.bytes.data_ptr(), buffer.bytes.numel()
            if start in self._kept:
                continue
            if register_pages(start, nbytes, PORTABLE, self._device):
                self._kept[start] = buffer  # its memory must outlive the registration
            else:
                refused += nbytes
        if refused:
            logger.warning(
                "%.1f MiB of flash buffers cannot be registered with %s: copies from them block "
                "the host",
                refused / 2**20, self._device,
            )  # fmt: skip

    def release(self) -> None:
        """Unregister all pages, once nothing is copied any more. Mutates."""
        for start in self._kept:
            torch.cuda.cudart().cudaHostUnregister(start)
        self._kept.clear()
