"""Everything worth knowing about a GPU in 7.5 minutes: is the product right on it, how fast, and
what holds it up?

Each stage runs in a process of its own with a time limit, so that one that hangs or dies costs only
itself. Every result is appended to `results.jsonl` in `--out` as soon as it is known, with device,
driver, versions and commit; each stage has a log beside it. A run into the same folder goes on with
the stages that have not ended well there, and two runs that were cut off make a whole one.

Without a card every stage runs at a tiny size on the emulated accelerator and Triton's interpreter,
and says so. The exit status is 0 if every stage of the check ended well, now or before, and nothing
was wrong.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from eval import report
from eval.gpu_stages.child import RESULTS
from eval.gpu_stages.plan import CORE_S, DRY_LIMIT_S, PREPARE, STAGES, TOTAL_S, Stage
from eval.gpu_stages.results import END, Line, done, headline, merged, rows, summary
from eval.gpu_stages.runner import End, Running
from eval.journal import Journal

UNKNOWN = "unknown card"
"""A card whose driver does not say its name."""
LEAST_S = 5.0
"""A stage is not begun with less time than this."""


def main(
    arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES
) -> dict[str, Any]:
    """Run the check; gives what the JSON line says.

    Raises:
        SystemExit: the folders cannot be used.
    """
    started = time.monotonic()
    logging.basicConfig(level=logging.WARNING)
    parser = _parser(stages)
    args = parser.parse_args(arguments)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error}")
    journal = Journal(args.out / RESULTS)
    if args.fresh:
        journal.clear()
    card = None if args.emulated else card_name()
    if card is None and not args.emulated:
        _say(
            "no NVIDIA GPU here: every stage runs emulated, at a tiny size; no number is a "
            "measurement"
        )
    check = Check(journal, args.out, card, report.commit())
    kind = [
        stage
        for stage in stages
        if (check.dry or not stage.on_demand) and (stage.core or not args.core)
    ]
    limit_s = args.limit if args.limit is not None else CORE_S if args.core else TOTAL_S
    if check.dry and args.limit is None:
        limit_s = DRY_LIMIT_S * len(stages)
    try:
        with _scratch(args.scratch) as scratch, _ended_by_signal():
            chosen = wanted(stages, kind, args.stage, check.done())
            check.run(chosen, scratch, started + limit_s)
    except (KeyboardInterrupt, OSError) as problem:
        reason = "interrupted" if isinstance(problem, KeyboardInterrupt) else str(problem)
        _say(
            f"{reason}: what follows is what was known by then; the same command goes on with the "
            f"rest"
        )
    lines = check.lines()
    _show(lines, stages, check.dry)
    names = [stage.name for stage in kind]
    result = {
        **summary(lines, names, [stage.name for stage in kind if stage.judges]),
        "emulated": check.dry,
    }
    report.finish(result)
    return result


def card_name() -> str | None:
    """The first GPU's name, None without one; asked of the driver's own tool, since torch would
    take seconds to load.

    A card whose driver does not answer in time is still a card: its stages will say what is wrong.
    """
    names = report.nvidia_smi("name")
    if names is None:
        return UNKNOWN if any(Path("/dev").glob("nvidia[0-9]*")) else None
    return names[0] if names else None


def wanted(
    stages: Sequence[Stage], kind: Sequence[Stage], named: Sequence[str] | None, ended: set[str]
) -> list[Stage]:
    """The stages to run: those named, else those of this kind of check that have not ended well in
    this folder.

    Whatever needs the model's file has the stage that writes it before it: on a new machine it is
    not there any more.
    """
    chosen = {stage.name for stage in stages if named and stage.name in named}
    if not named:
        chosen = {stage.name for stage in kind} - ended
        if kept := [stage.name for stage in kind if stage.name in ended]:
            _say(f"already there, and not run again: {', '.join(kept)} (--fresh begins anew)")
    if any(stage.model for stage in stages if stage.name in chosen):
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
        """The lines of this device. Emulated and measured ones, or those of two cards, never share
        a table.
        """
        found = [line for line in self._journal.rows() if line.get("emulated") == self.dry]
        if self._card == UNKNOWN:
            cards = [line["gpu"] for line in found if line.get("gpu") not in (None, UNKNOWN)]
            return merged(line for line in found if line.get("gpu") in (UNKNOWN, *cards[-1:]))
        return merged(line for line in found if self.dry or line.get("gpu") == self._card)

    def done(self) -> set[str]:
        """The stages that need not be run again."""
        lines = self.lines()
        return done(lines) - {line["stage"] for line in lines if line.get("commit") != self._commit}

    def run(self, stages: Sequence[Stage], scratch: Path, deadline: float) -> None:
        """Run stages one after another until the deadline (`time.monotonic`); each end is a line in
        the journal.

        On a card a stage gets its own limit and whatever the stages before it have left of theirs.

        Raises:
            KeyboardInterrupt, OSError: after the running processes were ended.
        """
        most = sum(self._limit(stage) for stage in stages if not stage.background)
        left = deadline - time.monotonic()
        _say(
            f"{len(stages)} stages, at most {max(0.0, min(most, left)):.0f} s; results in "
            f"{self._out}"
        )
        self._warn_of_compiling()
        try:
            for number, stage in enumerate(stages, 1):
                if stage.quiet:
                    self._finish_background()
                later = sum(self._limit(after) for after in stages[number:] if not after.background)
                left = deadline - time.monotonic()
                limit = min(left, max(self._limit(stage), 0.0 if self.dry else left - later))
                if limit < LEAST_S:
                    self._note(
                        End(
                            stage.name,
                            "",
                            "skipped",
                            0.0,
                            "no time left; the same command goes on here",
                        )
                    )
                    continue
                _say(f"[{number}/{len(stages)}] {stage.name}: {stage.what} (at most {limit:.0f} s)")
                flags = ["--dry"] if self._card is None else ["--card", self._card]
                self._beside.append(Running(stage, limit, self._out, scratch, flags))
                if not stage.background:
                    self._note(self._beside[-1].wait())
                    self._beside.pop()
            self._finish_background()
        finally:
            for running in self._beside:
                running.kill()

    def _limit(self, stage: Stage) -> float:
        # A dry run often shares its cores with others, and nothing is lost if it takes its time.
        return min(2 * stage.limit_s, DRY_LIMIT_S) if self.dry else stage.limit_s

    def _finish_background(self) -> None:
        while self._beside:
            self._note(self._beside[0].wait())
            del self._beside[0]

    def _note(self, end: End) -> None:
        known = {
            "stage": end.stage,
            "case": END,
            "run": end.run,
            "status": end.status,
            "seconds": end.seconds,
        }
        facts = {"emulated": self.dry, "gpu": self._card or "none", "commit": self._commit}
        self._journal.append({**known, "detail": end.detail, **facts})
        _say(
            f"    {end.stage}: {end.status} after {end.seconds:.1f} "
            f"s{'; ' + end.detail if end.detail else ''}"
        )

    def _warn_of_compiling(self) -> None:
        cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        if not self.dry and not (cache.is_dir() and any(cache.iterdir())):
            _say(
                f"{cache} holds no compiled kernels: stages will spend their time compiling. "
                "`python -m eval.kernel_prebuild --cache DIR` compiles all of them on every core, "
                "see docs/gpu.md"
            )


def _show(lines: Sequence[Line], stages: Sequence[Stage], dry: bool) -> None:
    title = "emulated, no number is a measurement" if dry else "measured"
    for stage in stages:
        found = rows(lines, stage.name)
        if found:
            report.show(f"{stage.name}: {stage.what} ({title})", _columns(found))
    ends = {line["stage"]: line for line in lines if line["case"] == END}
    table = []
    for stage in stages:
        end = ends.get(stage.name, {})
        status = end.get("status", "cut off" if rows(lines, stage.name) else "not run")
        known = {"stage": stage.name, "status": status, "seconds": end.get("seconds", "")}
        table.append(
            {**known, "found": headline(lines, stage.name), "detail": end.get("detail", "")[:60]}
        )
    report.show(f"All stages ({title})", table)
    commits = sorted({str(line["commit"]) for line in lines if line.get("commit")})
    if len(commits) > 1:
        _say(f"these results are of several commits: {', '.join(commits)}")


def _columns(found: Sequence[Line]) -> list[dict[str, Any]]:
    """A stage's rows with the same columns in each, without what every line carries."""
    names: dict[str, None] = {}
    for line in found:
        names |= dict.fromkeys(name for name in line if name not in _EVERYWHERE)
    return [{name: line.get(name, "") for name in names} for line in found]


_EVERYWHERE = {
    "stage",
    "at_s",
    "run",
    "emulated",
    "cpu",
    "cores",
    "gpu",
    "os",
    "python",
    "torch",
    "triton",
    "transformers",
    "kt-kernel",
    "ktransformers-hybrimoe",
    "driver",
    "commit",
    "date",
}


@contextmanager
def _scratch(given: Path | None) -> Iterator[Path]:
    """Where large files go. Kept from run to run, so that a stage that is run again need not write
    them again.

    Raises:
        OSError: it cannot be used, or another check uses it: two would disturb each other's times.
    """
    folder = given or Path(tempfile.gettempdir()) / f"hybrimoe-gpu-check-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another check is running in {folder}") from None
        yield folder.resolve()


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM and a lost terminal end the check as Ctrl-C does: stages are stopped, and what is
    known is shown.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup wants it to go on
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _parser(stages: Sequence[Stage]) -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        epilog="stages:\n"
        + "\n".join(f"  {stage.name:12} {_kind(stage):10} {stage.what}" for stage in stages),
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for results and logs (default out)"
    )
    parser.add_argument(
        "--core",
        action="store_true",
        help=f"only the core stages: {CORE_S / 60:.0f} minutes at most",
    )
    parser.add_argument(
        "--stage",
        action="append",
        choices=[stage.name for stage in stages],
        help="run this stage (again); repeatable",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what the folder holds already")
    parser.add_argument(
        "--emulated", action="store_true", help="a dry run, even where there is a card"
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for all stages together")
    parser.add_argument(
        "--scratch", type=Path, help="folder for large files (default: in the temporary folder)"
    )
    return parser


def _kind(stage: Stage) -> str:
    return "core" if stage.core else "on demand" if stage.on_demand else "full"


if __name__ == "__main__":
    verdict = main()
    sound = verdict["correct"] and not verdict["stages_failed"] and not verdict["stages_missing"]
    sys.exit(0 if sound else 1)
