"""Is the product right on a GPU, how fast is it, and what limits it? Answered in 9.5 minutes.

Each stage runs in a process of its own with a time limit, so that one that hangs or dies costs only
itself. Every result is appended to `results.jsonl` in `--out` as soon as it is known, with device,
driver, versions and commit; each stage has a log beside it. A run into the same folder continues
with the stages that have not ended well there, and two runs that were cut off make a whole one.

Without a card every stage runs at a tiny size on the emulated accelerator and Triton's interpreter,
and says so. The exit status is 0 if every stage of the check ended well, now or before, and nothing
was wrong.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from eval.gpu_check.check import Check, card_name, say, wanted
from eval.gpu_check.child import RESULTS
from eval.gpu_check.plan import CORE_S, DRY_LIMIT_S, STAGES, TOTAL_S, Stage
from eval.gpu_check.results import Line, summary
from eval.gpu_check.tables import show
from eval.reporting import report
from eval.reporting.journal import Journal


def main(
    arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES
) -> dict[str, Any]:
    """Run the check; gives the contents of the JSON line.

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
        say(
            "no NVIDIA GPU here: every stage runs emulated, at a tiny size; no number is a "
            "measurement"
        )
    check = Check(journal, args.out, card, report.commit())
    kind = [stage for stage in stages if _belongs(stage, check.dry, args.core)]
    deadline = started + _limit_s(args.limit, args.core, check.dry, len(stages))
    try:
        with _scratch(args.scratch) as scratch, _ended_by_signal():
            chosen = wanted(stages, kind, args.stage, check.done())
            check.run(chosen, scratch, deadline)
    except (KeyboardInterrupt, OSError) as problem:
        reason = "interrupted" if isinstance(problem, KeyboardInterrupt) else str(problem)
        say(
            f"{reason}: what follows is what was known by then; the same command goes on with the "
            f"rest"
        )
    lines = check.lines()
    show(lines, stages, check.dry)
    _warn_of_commits(lines)
    names = [stage.name for stage in kind]
    judges = [stage.name for stage in kind if stage.judges]
    result = {**summary(lines, names, judges), "emulated": check.dry}
    report.finish(result)
    return result


def exit_status(verdict: dict[str, Any]) -> int:
    """0 if every stage of the check ended well and nothing was wrong, else 1."""
    if verdict["stages_failed"] or verdict["stages_missing"]:
        return 1
    return 0 if verdict["correct"] else 1


def _belongs(stage: Stage, dry: bool, core: bool) -> bool:
    """Whether a check of this kind has the stage."""
    if stage.on_demand and not dry:
        return False
    return stage.core or not core


def _limit_s(given: float | None, core: bool, dry: bool, stages: int) -> float:
    """Seconds for all stages together."""
    if given is not None:
        return given
    if dry:
        return DRY_LIMIT_S * stages
    return CORE_S if core else TOTAL_S


def _warn_of_commits(lines: Sequence[Line]) -> None:
    commits = sorted({str(line["commit"]) for line in lines if line.get("commit")})
    if len(commits) > 1:
        say(f"these results are of several commits: {', '.join(commits)}")


@contextmanager
def _scratch(given: Path | None) -> Iterator[Path]:
    """The folder for large files, locked while this check runs.

    It is kept, so that a stage that is run again need not write them again.

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
    """Let SIGTERM and a lost terminal end the check as Ctrl-C does.

    Stages are stopped, and what is known is shown.
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


def _parser(stages: Sequence[Stage]) -> ArgumentParser:
    listed = [f"  {stage.name:12} {_kind(stage):10} {stage.what}" for stage in stages]
    parser = ArgumentParser(
        prog="python -m eval.gpu_check",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        epilog="\n".join(["stages:", *listed]),
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
    if stage.core:
        return "core"
    return "on demand" if stage.on_demand else "full"
