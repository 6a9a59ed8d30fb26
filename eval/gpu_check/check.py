"""One check: which stages are run, one after another, and what is known of them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from eval.gpu_check.plan import DRY_LIMIT_S, PREPARE, Stage
from eval.gpu_check.results import END, Line, done, merged
from eval.gpu_check.runner import End, Running
from eval.reporting import report
from eval.reporting.journal import Journal

UNKNOWN = "unknown card"
"""A card whose driver does not say its name."""
LEAST_S = 5.0
"""A stage is not begun with less time than this."""


def card_name() -> str | None:
    """The first GPU's name as the driver's own tool gives it; None without a GPU.

    torch would take seconds to load. A card whose driver does not answer in time is still a card:
    its stages will say what is wrong.
    """
    names = report.nvidia_smi("name")
    if names is not None:
        return names[0] if names else None
    has_device = any(Path("/dev").glob("nvidia[0-9]*"))
    return UNKNOWN if has_device else None


def wanted(
    stages: Sequence[Stage],
    kind: Sequence[Stage],
    named: Sequence[str] | None,
    ended: set[str],
) -> list[Stage]:
    """The stages to run, in their order.

    Those are the named ones, else those of this kind of check that have not ended well in this
    folder. The stage that writes the model's file comes before any that needs it: on a new machine
    the file is not there any more.

    Args:
        kind: the stages of this kind of check.
        ended: names of the stages that have ended well.
    """
    if named:
        chosen = set(named)
    else:
        chosen = {stage.name for stage in kind} - ended
        kept = [stage.name for stage in kind if stage.name in ended]
        if kept:
            say(f"already there, and not run again: {', '.join(kept)} (--fresh begins anew)")
    found = [stage for stage in stages if stage.name in chosen]
    if any(stage.model for stage in found):
        chosen.add(PREPARE)
    return [stage for stage in stages if stage.name in chosen]


class Check:
    """One check's stages and the lines that count for it.

    Args:
        card: the GPU's name; None for a dry run.
        commit: of this tree; what another commit's stages did is not done.
    """

    def __init__(self, journal: Journal, out: Path, card: str | None, commit: str) -> None:
        self.dry = card is None
        self._journal = journal
        self._out = out
        self._card = card
        self._commit = commit
        self._beside: list[Running] = []

    def lines(self) -> list[Line]:
        """The lines of this device.

        Emulated and measured ones, or those of two cards, never share a table.
        """
        found = [line for line in self._journal.rows() if line.get("emulated") == self.dry]
        if self.dry:
            return merged(found)
        accepted = {self._card}
        if self._card == UNKNOWN:
            # The card does not say its name today: it is taken for the one that did so last.
            cards = [line["gpu"] for line in found if line.get("gpu") not in (None, UNKNOWN)]
            accepted.update(cards[-1:])
        return merged(line for line in found if line.get("gpu") in accepted)

    def done(self) -> set[str]:
        """The stages that need not be run again."""
        lines = self.lines()
        others = {line["stage"] for line in lines if line.get("commit") != self._commit}
        return done(lines) - others

    def run(self, stages: Sequence[Stage], scratch: Path, deadline: float) -> None:
        """Run stages one after another; each end is a line in the journal.

        On a card a stage gets its own limit and whatever the stages before it have left of theirs.

        Args:
            deadline: no stage runs beyond it, as `time.monotonic` counts.

        Raises:
            KeyboardInterrupt, OSError: after the running processes were ended.
        """
        left = deadline - time.monotonic()
        most = max(0.0, min(self._limits(stages), left))
        say(f"{len(stages)} stages, at most {most:.0f} s; results in {self._out}")
        self._warn_of_compiling()
        try:
            for number, stage in enumerate(stages, 1):
                if stage.quiet:
                    self._finish_background()
                limit = self._time_for(stage, stages[number:], deadline)
                if limit < LEAST_S:
                    reason = "no time left; the same command goes on here"
                    self._note(End(stage.name, "", "skipped", 0.0, reason))
                    continue
                say(f"[{number}/{len(stages)}] {stage.name}: {stage.what} (at most {limit:.0f} s)")
                self._start(stage, limit, scratch)
            self._finish_background()
        finally:
            for running in self._beside:
                running.kill()

    def _start(self, stage: Stage, limit_s: float, scratch: Path) -> None:
        """Start a stage's process, and wait for it unless it may run beside others."""
        flags = ["--dry"] if self._card is None else ["--card", self._card]
        running = Running(stage, limit_s, self._out, scratch, flags)
        self._beside.append(running)
        if not stage.background:
            self._note(running.wait())
            self._beside.pop()

    def _time_for(self, stage: Stage, later: Sequence[Stage], deadline: float) -> float:
        left = deadline - time.monotonic()
        spare = 0.0 if self.dry else left - self._limits(later)
        return min(left, max(self._limit(stage), spare))

    def _limits(self, stages: Sequence[Stage]) -> float:
        """Longest time of stages that run one after another."""
        return sum(self._limit(stage) for stage in stages if not stage.background)

    def _limit(self, stage: Stage) -> float:
        if self.dry:
            # A dry run often shares its cores with others, and nothing is lost if it takes longer.
            return min(2 * stage.limit_s, DRY_LIMIT_S)
        return stage.limit_s

    def _finish_background(self) -> None:
        while self._beside:
            self._note(self._beside[0].wait())
            del self._beside[0]

    def _note(self, end: End) -> None:
        self._journal.append(
            {
                "stage": end.stage,
                "case": END,
                "run": end.run,
                "status": end.status,
                "seconds": end.seconds,
                "detail": end.detail,
                "emulated": self.dry,
                "gpu": self._card or "none",
                "commit": self._commit,
            }
        )
        detail = f"; {end.detail}" if end.detail else ""
        say(f"    {end.stage}: {end.status} after {end.seconds:.1f} s{detail}")

    def _warn_of_compiling(self) -> None:
        if self.dry:
            return
        folder = os.environ.get("TRITON_CACHE_DIR")
        cache = Path(folder) if folder else Path.home() / ".triton" / "cache"
        if cache.is_dir() and any(cache.iterdir()):
            return
        say(
            f"{cache} holds no compiled kernels: stages will spend their time compiling. "
            "`python -m eval.kernel_prebuild --cache DIR` compiles all of them on every core, "
            "see docs/gpu.md"
        )


def say(what: str) -> None:
    """Progress goes to stderr: the last line of stdout is the result."""
    print(what, file=sys.stderr, flush=True)
