"""How long a run of cells will take, corrected by every cell that is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from tqdm import tqdm


class Planned(NamedTuple):
    """Cells of one kind that are still to be measured."""

    cells: int
    seconds: float
    """A guess at what one takes."""


@dataclass
class _Kind:
    left: int
    guess_s: float
    done: int = 0
    spent_s: float = 0.0

    def left_s(self) -> float:
        """As many seconds a cell as the measured ones took; the guess, until there are any."""
        each = self.spent_s / self.done if self.done else self.guess_s
        return self.left * each


class Progress:
    """A bar on stderr, and an estimate on stdout before anything is measured.

    Use it in a `with` block.

    Args:
        planned: kind of cells -> how many are to be measured, and a guess at what each takes.
        taken: cells that an earlier run measured.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        planned: Mapping[str, Planned],
        taken: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kinds = {name: _Kind(plan.cells, plan.seconds) for name, plan in planned.items()}
        self._clock = clock
        self._last = clock()
        total = sum(plan.cells for plan in planned.values())
        parts = [f"{plan.cells} of {name}" for name, plan in planned.items() if plan.cells]
        kinds = f" ({' and '.join(parts)})" if parts else ""
        print(
            f"{total} cells to measure{kinds}, {taken} taken from an earlier run; about "
            f"{spoken(self.left_s())} (an estimate before anything is measured)",
            flush=True,
        )
        style = "{l_bar}{bar}| {n_fmt} of {total_fmt} cells{postfix}"
        self._bar = tqdm(total=total, unit="cell", file=sys.stderr, bar_format=style)

    def left_s(self) -> float:
        """Seconds until the last cell is done, as far as is known by now."""
        return sum(kind.left_s() for kind in self._kinds.values())

    def done(self, name: str) -> None:
        """One cell of this kind is measured.

        What went before it, such as loading its model, counts with it.
        """
        now = self._clock()
        kind = self._kinds[name]
        kind.left = max(0, kind.left - 1)
        kind.done += 1
        kind.spent_s += now - self._last
        self._last = now
        self._bar.set_postfix_str(f"about {spoken(self.left_s())} left", refresh=False)
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


def spoken(seconds: float) -> str:
    """Seconds or minutes, rounded to what an estimate is good for."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
