"""How the host learns, without asking the driver, that a graph has come to a point."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from hybrimoe_plugin.device.streams import PendingCopy
from hybrimoe_plugin.errors import BackendError

LOOKS = 50
"""Looks at the host's copy between two times that other threads of the process get a turn."""

LATE_S = 2.0
"""After so long the driver is asked: a device that has failed says so there."""


class Memory(Protocol):
    """What a stamp needs of an accelerator."""

    device: torch.device

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """CPU memory that this tensor can be copied to without stopping the host."""
        ...

    def synchronize(self) -> None:
        """Make the host wait for everything."""
        ...


class Stamp:
    """A number on the device that a graph raises at each replay, and its copy on the host.

    What the graph copied to the host before it is there once the number is:

        graph    ... | ids -> host | scores -> host | number + 1 | number -> host
        host     launch; look at the number in its own memory until it is the new one; read ids

    Looking costs a read of the host's memory. No call of the driver is in it, so nothing that
    another thread or stream waits for is held up.

    Attributes:
        seen: [1] the copy, which changes as the device goes on.
        expected: what the newest replay makes of the number; raise it before each replay. It has
            come to its mark once the two are equal.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        with torch.inference_mode(False):
            self._number = torch.zeros(1, dtype=torch.int64, device=memory.device)
            self._copy = memory.pinned_like(self._number)
            self._copy.zero_()
        # Not the array: the index of a view takes half the time.
        self.seen = memoryview(self._copy.numpy())
        self.expected = 0

    def mark(self) -> None:
        """Raise the number and copy it: the last operations of a graph that is being captured."""
        self._number.add_(1)
        self._copy.copy_(self._number, non_blocking=True)

    def reset(self) -> None:
        """Begin at 0 behind a capture, some of which run what they record; the device is idle."""
        self._number.zero_()
        self._copy.zero_()
        self.expected = 0

    def recover(self) -> None:
        """After an unfinished pass: begin with the number that is there; the device is idle."""
        self.expected = self.seen[0]

    def wait(self) -> None:
        """Look until the newest replay has come to its mark.

        Raises:
            BackendError: it does not.
            RuntimeError: what the device says of its failure.
        """
        seen, expected = self.seen, self.expected
        late = 0.0
        if seen[0] == expected:
            return
        while True:
            for _ in range(LOOKS):
                if seen[0] == expected:
                    return
            now = time.monotonic()
            late = late or now + LATE_S
            if now > late:
                break
            time.sleep(0)
        self._memory.synchronize()
        if seen[0] != expected:
            raise BackendError(
                f"a CUDA graph on {self._memory.device} has not come to its end: its mark is "
                f"{seen[0]}, not {expected}"
            )


class StampedCopy(PendingCopy):
    """Tensors that a graph copies to the host, with the stamp that tells of their arrival."""

    def __init__(self, stamp: Stamp, tensors: list[torch.Tensor]) -> None:
        self._stamp = stamp
        self._tensors = tensors

    def poll(self) -> list[torch.Tensor] | None:
        stamp = self._stamp
        return self._tensors if stamp.seen[0] == stamp.expected else None

    def wait(self) -> list[torch.Tensor]:
        self._stamp.wait()
        return self._tensors
