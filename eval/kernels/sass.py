"""Count instructions in a kernel that `nvdisasm` has taken apart.

A loop is a branch to a label at or before itself. The endless branch to itself that follows every
kernel's last EXIT is none, and what lies behind that EXIT is padding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_LINE = re.compile(r"^(?P<label>\.L\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?P<instruction>.*?)\s*;")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\b.*`\((?P<label>\.L\w+)\)")
_LOAD = re.compile(r"\bLDG\b|\bLDGSTS\b")


class Listing(NamedTuple):
    """The instructions of one kernel in their order, and its loops."""

    instructions: Sequence[str]
    loops: Sequence[range]
    """Places of each loop's instructions, the longest loop first."""

    def of(self, loop: range) -> Sequence[str]:
        """A loop's instructions."""
        return self.instructions[loop.start : loop.stop]


class Count(NamedTuple):
    """How many instructions one thread executes. A predicated one counts: it is issued too."""

    loop: float
    """In one pass of the main loop."""
    whole: float
    """From the program's start to its end, all passes of its loop included."""
    note: str
    """What is to be known about how they were counted."""


def listing(sass: str) -> Listing:
    """Read `nvdisasm`'s output for a cubin with one kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in sass.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        if found["label"]:
            labels[found["label"]] = len(instructions)
            continue
        branch = _BRANCH.search(found["instruction"])
        if branch is not None:
            branches.append((len(instructions), branch["label"]))
        instructions.append(found["instruction"])
    last = max(at for at, text in enumerate(instructions) if "EXIT" in text)
    loops = [
        range(labels[label], at + 1) for at, label in branches if at < last and labels[label] <= at
    ]
    return Listing(instructions[: last + 1], sorted(loops, key=len, reverse=True))


def loads(instructions: Sequence[str]) -> int:
    """How many of them load from the card's memory."""
    return sum(bool(_LOAD.search(text)) for text in instructions)


def counted(program: Listing, once: Listing, looped: Listing, passes: int) -> Count:
    """Instructions of a pass, and of a whole program.

    Args:
        program: the kernel as it is used.
        once: with a single pass. What it loads tells how many passes the compiler has put into one
            turn of the loop.
        looped: with so many passes that there is a loop.
        passes: of `program`.

    Raises:
        ValueError: the loop is not understood, so that no number could be trusted.
    """
    body = looped.of(_main_loop(looped))
    outside = loads(looped.instructions) - loads(body)
    a_pass = loads(once.instructions) - outside
    unrolled = round(loads(body) / a_pass) if a_pass > 0 else 0
    if unrolled < 1 or unrolled * a_pass != loads(body):
        raise ValueError(f"a turn of the loop has {loads(body)} loads, a pass {a_pass}")
    note = "" if unrolled == 1 else f"{unrolled} passes a turn"
    whole = float(len(program.instructions))
    if program.loops:
        own = len(_main_loop(program))
        whole += own * (passes / unrolled - 1)
    return Count(len(body) / unrolled, whole, note)


def _main_loop(code: Listing) -> range:
    """The longest of several loops that lie beside one another."""
    if not code.loops:
        raise ValueError("there is no loop")
    main, *others = code.loops
    if any(main.start <= other.start < main.stop for other in others):
        raise ValueError("a loop lies inside another")
    return main
