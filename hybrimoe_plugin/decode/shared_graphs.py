"""What graphed layers share: the mechanism, and a decode step's inputs at fixed addresses."""

from __future__ import annotations

import logging
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.flashinfer_choice import (
    FlashinferKernel,
    FlashinferShape,
    choose,
)
from hybrimoe_plugin.device.cuda_graphs import Capture

log = logging.getLogger(__name__)


class DecodeGraphs:
    """What the graphed layers of one device share: the mechanism, and a step's inputs at fixed
    addresses.

    Attributes:
        refusal: why the layers run eagerly from now on; None while graphs are used.
        place: [1] int64, where this step's token lies in the cache.
        layers: how many share it.
    """

    def __init__(self, capture: Capture, device: torch.device) -> None:
        self.capture = capture
        self.refusal: str | None = None
        self.layers = 0
        self._device = device
        with torch.inference_mode(False):
            self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self._kernels: dict[FlashinferShape, FlashinferKernel | None] = {}
        self._held = -1
        self._given: tuple[torch.Tensor, ...] = ()
        self._angles: tuple[torch.Tensor, ...] = ()
        self._is_tuple = True

    @property
    def angles(self) -> Any:
        """Position embeddings at their fixed addresses, in the form in which the model
        gives them.
        """
        return self._angles if self._is_tuple else self._angles[0]

    def show(self, held: int, angles: Any) -> bool:
        """Set the step's inputs: tokens held, position embeddings; only a step's first layer has
        something to do.

        Returns:
            whether they are of the kind that graphs were made for.
        """
        given = (angles,) if isinstance(angles, torch.Tensor) else tuple(angles)
        if not self._angles:
            self._is_tuple = not isinstance(angles, torch.Tensor)
            with torch.inference_mode(False):
                self._angles = tuple(torch.zeros_like(part) for part in given)
        if held != self._held:
            self._held = -1  # unknown until all of it is set: an interrupted step leaves a part
            self._put(held)
            self._held = held
        # `is` on tensors that are kept: no later step's can be taken for them.
        if len(given) == len(self._given) and all(
            a is b for a, b in zip(given, self._given, strict=True)
        ):
            return True
        if [_kind(part) for part in given] != [_kind(part) for part in self._angles]:
            return False
        self._given = ()
        for fixed, part in zip(self._angles, given, strict=True):
            fixed.copy_(part)
        self._given = given
        return True

    def scramble(self, row: int) -> None:
        """Inputs unlike any step's, so that a capture that froze one of its own step's is found
        out.
        """
        self._put(row)
        for part in self._angles:
            part.fill_(0.5)
        self._held, self._given = -1, ()

    def kernel(self, shape: FlashinferShape) -> FlashinferKernel | None:
        """Attention that is faster than torch's for this shape; looked for once."""
        if shape not in self._kernels:
            # Smaller caches are full by now, in every layer.
            self._kernels = {
                known: kernel for known, kernel in self._kernels.items() if known.room >= shape.room
            }
            self._kernels[shape] = choose(shape, self._device, self.capture, max(1, self.layers))
            self._held = -1  # so that the next `show` plans for it too
        return self._kernels[shape]

    def serves(self, kernel: FlashinferKernel | None) -> bool:
        """Whether steps are still planned for a kernel that a layer was captured with."""
        return kernel is None or any(kernel is known for known in self._kernels.values())

    def without_kernels(self, reason: str) -> bool:
        """Do without other kernels than torch's from now on; gives whether there were any."""
        used = [shape for shape, kernel in self._kernels.items() if kernel is not None]
        if used:
            log.warning("flashinfer is not used on %s any more: %s", self._device, reason)
        self._kernels.update(dict.fromkeys(used))
        return bool(used)

    def _put(self, row: int) -> None:
        self.place.fill_(row)
        for shape, kernel in self._kernels.items():
            if kernel is not None and row < shape.room:
                kernel.plan(row)

    def refuse(self, reason: str) -> None:
        """Every layer runs eagerly from now on; says so once."""
        if self.refusal is None:
            self.refusal = reason
            log.warning(
                "CUDA graphs are not used on %s: %s; decoding goes on without them",
                self._device,
                reason,
            )


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
