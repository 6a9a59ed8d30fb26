"""What a model will take in each kind of memory, as numbers that loading is refused by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hybrimoe_plugin.compute.cpu.requantise import Requantised
from hybrimoe_plugin.device.memory import human
from hybrimoe_plugin.errors import BackendError, BudgetError

MEMORY = "memory"
PINNED = "pinned"
MAPPED = "mapped"
DISK = "disk"
EMULATED = "emulated"

PLACES: Mapping[str, str] = {
    EMULATED: "emulated accelerator",
    MEMORY: "DRAM, read or dequantised",
    PINNED: "DRAM, pinned for transfers",
    MAPPED: "DRAM, mapped from the file",
    DISK: "disk, read at every use",
}
"""Place -> how people call it. An accelerator is a place by its own name, such as `cuda:0`."""

ON_HOST = (EMULATED, MEMORY, PINNED)
"""Places that take main memory which nothing else can use meanwhile."""


OTHER_FILE = "; take a file in other types, such as Q4_K"
"""What to do where copies for want of a kernel do not fit."""
ON_TORCH = (
    ", or cpu_backend='torch' with dense='quantised', which computes experts as they are stored, "
    "but more than ten times slower"
)
"""The same for experts on the CPU."""


class Part(NamedTuple):
    """A part of a model in one place."""

    place: str
    what: str
    nbytes: int
    later: bool = False
    """Whether it is not there when loading ends, as a KV cache, which grows with the text."""
    most: bool = False
    """Whether it is an upper limit: a measurement at load decides."""


class LayerPlace(NamedTuple):
    """Where one decoder layer lies."""

    layer: int
    dense: Mapping[str, int]
    """Place -> bytes of its attention and other dense parts there."""
    experts: str | None
    """Place of its routed experts; None for a layer without any."""
    routed: int
    """Number of its routed experts."""
    cached: int
    """Of its experts, those whose slots on an accelerator it begins with."""
    replaced: bool
    """Whether the engine computes the experts."""


@dataclass(frozen=True)
class Unreplaced:
    """Routed experts that no rule replaces, so that every weight of theirs is dequantised."""

    names: str
    """Of their modules, as one text."""
    nbytes: int
    stored_bytes: int
    """What they take in the file."""

    def text(self) -> str:
        return (
            f"no rule replaces {self.names}: these experts are dequantised and take "
            f"{human(self.nbytes)} (the file has them in {human(self.stored_bytes)})"
        )


@dataclass(frozen=True)
class Prediction:
    """Where the parts of a model will lie, and what is free there.

    Activations, the libraries themselves and measurements are not in it: some hundred MiB.
    """

    parts: tuple[Part, ...]
    layers: tuple[LayerPlace, ...]
    context: int
    """Tokens for which the KV cache is counted."""
    free: Mapping[str, int]
    """Free bytes now, of the host as `memory` and of each accelerator."""
    outside: Mapping[str, int] = field(default_factory=dict)
    """Place -> bytes of dense parts outside the layers, such as the embedding."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Accelerator -> why it cannot be used here, of those that the model cannot do without."""
    unreplaced: Unreplaced | None = None
    requantised: tuple[Requantised, ...] = ()
    """Matrices in types without a kernel, one item for each pair of types."""
    notes: tuple[str, ...] = field(default=())
    """What else the reader of the numbers has to know."""

    def places(self) -> list[str]:
        """Places that hold something: accelerators first, disk last."""
        used = dict.fromkeys(part.place for part in self.parts if part.nbytes)
        devices = [place for place in used if place not in PLACES]
        return sorted(devices) + [place for place in PLACES if place in used]

    def total(self, *places: str, later: bool = True, most: bool = False) -> int:
        """Bytes in these places.

        Args:
            later: with what is not there yet when loading ends.
            most: with upper limits.
        """
        found = 0
        for part in self.parts:
            counts = (later or not part.later) and (most or not part.most)
            if part.place in places and counts:
                found += part.nbytes
        return found

    def needed_on_host(self) -> int:
        """Bytes of main memory that nothing else can use meanwhile, and those of mapped files."""
        return self.total(*ON_HOST, MAPPED)

    def check(self) -> None:
        """Refuse what cannot be loaded.

        Raises:
            BackendError: an accelerator that is asked for cannot be used here.
            BudgetError: the weights do not fit into main memory, or not onto an accelerator; has
                both numbers.
        """
        for device, reason in self.missing.items():
            raise BackendError(
                f"accelerator cuda on {device}: {reason}; use --device cpu, or "
                "accelerator='none' in Python"
            )
        for place in self.places():
            if place not in PLACES and place in self.free:
                self._check(place, "on the accelerator", self.total(place, later=False))
        self._check(MEMORY, "into memory", self.total(*ON_HOST, later=False))

    def _check(self, place: str, where: str, needed: int) -> None:
        free = self.free[place]
        if needed <= free:
            return
        reason = f"; {self.unreplaced.text()}" if self.unreplaced is not None else ""
        here = [item for item in self.requantised if item.on_device == (place != MEMORY)]
        if here:
            reason += "".join(f"; {item.text()}" for item in here) + OTHER_FILE
            reason += ON_TORCH if place == MEMORY else ""
        raise BudgetError(
            f"the weights do not fit {where}: they need {human(needed)} of {place}, {human(free)} "
            f"are free{reason} (hybrimoe explain shows what takes how much)"
        )

    def warnings(self) -> list[str]:
        """What fits, but not well; each is one clause of a sentence."""
        found = []
        if self.unreplaced is not None:
            found.append(self.unreplaced.text())
        found += [item.text() for item in self.requantised]
        free = self.free[MEMORY]
        needed = self.total(*ON_HOST)
        if needed > free:
            found.append(
                f"with the KV cache of {self.context} tokens this needs {human(needed)} of memory, "
                f"{human(free)} are free: give a smaller context"
            )
        disk = self.total(DISK)
        if disk:
            found.append(
                f"{human(disk)} of the file do not fit into memory beside the rest: they are read "
                "from disk whenever they are used"
            )
        return found


def with_disk(parts: Sequence[Part], free: int) -> list[Part]:
    """The parts, where mapped bytes that memory has no room for lie on disk instead.

    Args:
        free: bytes of main memory.
    """
    taken = sum(part.nbytes for part in parts if part.place in ON_HOST and not part.most)
    room = max(0, free - taken)
    found = []
    for part in parts:
        if part.place != MAPPED:
            found.append(part)
            continue
        kept = min(part.nbytes, room)
        room -= kept
        if kept:
            found.append(part._replace(nbytes=kept))
        if kept < part.nbytes:
            found.append(part._replace(place=DISK, nbytes=part.nbytes - kept))
    return found
