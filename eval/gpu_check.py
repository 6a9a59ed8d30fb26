"""Everything worth knowing about a GPU in 7.5 minutes: is the product right on it, how fast, and what holds it up?

Each stage runs in a process of its own with a time limit, so that one that hangs or dies costs only itself. Every
result is appended to `results.jsonl` in `--out` as soon as it is known, with device, driver, versions and commit; each
stage has a log beside it. A run into the same folder goes on with the stages that have not ended well there, and two
runs that were cut off make a whole one.

Without a card every stage runs at a tiny size on the emulated accelerator and Triton's interpreter, and says so.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from eval import report
from eval.gpu_stages.plan import CORE_S, DRY_LIMIT_S, STAGES, TOTAL_S, Stage
from eval.gpu_stages.results import END, Line, done, headline, merged, rows, summary
from eval.gpu_stages.runner import End, Running
from eval.journal import Journal

log = logging.getLogger(__name__)

LEAST_S = 5.0
"""A stage is not begun with less time than this."""


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> dict[str, Any]:
    """Run the check; gives what the JSON line says."""
    logging.basicConfig(level=logging.WARNING)
    args = _parser(stages).parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.out / "results.jsonl")
    if args.fresh:
        journal.clear()
    dry = args.emulated or not has_card()
    if dry and not args.emulated:
        _say("no NVIDIA GPU here: every stage runs emulated, at a tiny size; no number is a measurement")
    chosen = wanted(stages, args, done(_lines(journal, dry)), dry)
    limit_s = args.limit or (CORE_S if args.core else TOTAL_S)
    with _folder(args.scratch) as scratch, _ended_by_signal():
        try:
            run(chosen, journal, args.out, scratch, dry=dry, core=args.core, limit_s=limit_s)
        except KeyboardInterrupt:
            _say("interrupted: what follows is what was known by then; the same command goes on with the rest")
    lines = _lines(journal, dry)
    _show(lines, stages, dry)
    result = summary(lines)
    report.finish(result)
    return result


def has_card() -> bool:
    """Whether the driver lists a GPU; asked of the driver's own tool, since torch would take seconds to load."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU" in found.stdout


def wanted(stages: Sequence[Stage], args: Namespace, ended: set[str], dry: bool) -> list[Stage]:
    """The stages to run: those named, else those of this kind of run that have not ended well in this folder."""
    if args.stage:
        return [stage for stage in stages if stage.name in args.stage]
    kind = [stage for stage in stages if (dry or not stage.on_demand) and (stage.core or not args.core)]
    left = [stage for stage in kind if stage.name not in ended]
    if len(left) < len(kind):
        kept = ", ".join(stage.name for stage in kind if stage.name in ended)
        _say(f"already there, and not run again: {kept} (--fresh begins anew)")
    return left


def run(
    stages: Sequence[Stage], journal: Journal, out: Path, scratch: Path, *, dry: bool, core: bool, limit_s: float
) -> None:
    """Run stages one after another; each end is a line in the journal.

    Raises:
        KeyboardInterrupt: after the running processes were ended.
    """
    deadline = time.monotonic() + (limit_s if not dry else DRY_LIMIT_S * len(stages))
    flags = [*(["--dry"] if dry else []), *(["--core"] if core else [])]
    most = sum(min(stage.limit_s, DRY_LIMIT_S if dry else stage.limit_s) for stage in stages if not stage.background)
    _say(f"{len(stages)} stages, at most {min(most, deadline - time.monotonic()):.0f} s; results in {out}")
    beside: list[Running] = []
    try:
        for number, stage in enumerate(stages, 1):
            if stage.quiet:
                _finish_background(beside, journal, dry)
            limit = min(DRY_LIMIT_S if dry else stage.limit_s, deadline - time.monotonic())
            if limit < LEAST_S:
                _note(journal, End(stage.name, "skipped", 0.0, "no time left; the same command goes on here"), dry)
                continue
            _say(f"[{number}/{len(stages)}] {stage.name}: {stage.what} (at most {limit:.0f} s)")
            beside.append(Running(stage, limit, out, scratch, flags))
            if not stage.background:
                _note(journal, beside[-1].wait(), dry)
                beside.pop()
        _finish_background(beside, journal, dry)
    finally:
        for left in beside:
            left.kill()


def _finish_background(beside: list[Running], journal: Journal, dry: bool) -> None:
    while beside:
        _note(journal, beside[0].wait(), dry)
        del beside[0]


def _note(journal: Journal, end: End, dry: bool) -> None:
    known = {"stage": end.stage, "case": END, "status": end.status, "seconds": end.seconds, "detail": end.detail}
    seen = [line for line in journal.rows() if line.get("gpu") is not None and line.get("emulated") == dry]
    newest = seen[-1] if seen else {}
    facts: dict[str, Any] = {name: newest[name] for name in ("gpu", "driver", "commit", "date") if name in newest}
    journal.append({**known, "emulated": dry, **facts})
    _say(f"    {end.stage}: {end.status} after {end.seconds:.1f} s{'; ' + end.detail if end.detail else ''}")


def _lines(journal: Journal, dry: bool) -> list[Line]:
    """This kind of run's newest lines: emulated and measured ones never share a table."""
    return merged(line for line in journal.rows() if line.get("emulated") == dry)


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
        table.append({**known, "found": headline(lines, stage.name), "detail": end.get("detail", "")[:60]})
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
    "stage", "at_s", "emulated", "cpu", "cores", "gpu", "os", "python", "torch", "triton", "transformers", "kt-kernel",
    "ktransformers-hybrimoe", "driver", "commit", "date",
}  # fmt: skip


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Where large files go. Kept from run to run, so that a stage that is run again need not write them again."""
    folder = given or Path(tempfile.gettempdir()) / f"hybrimoe-gpu-check-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    yield folder


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM ends the check as Ctrl-C does: stages are stopped, and what is known is shown."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _parser(stages: Sequence[Stage]) -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        epilog="stages:\n" + "\n".join(f"  {stage.name:12} {_kind(stage):10} {stage.what}" for stage in stages),
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for results and logs (default out)")
    parser.add_argument("--core", action="store_true", help=f"only the core stages: {CORE_S / 60:.0f} minutes at most")
    parser.add_argument(
        "--stage", action="append", choices=[stage.name for stage in stages], help="run this stage (again); repeatable"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what the folder holds already")
    parser.add_argument("--emulated", action="store_true", help="a dry run, even where there is a card")
    parser.add_argument("--limit", type=float, help="seconds for all stages together")
    parser.add_argument("--scratch", type=Path, help="folder for large files (default: in the temporary folder)")
    return parser


def _kind(stage: Stage) -> str:
    return "core" if stage.core else "on demand" if stage.on_demand else "full"


if __name__ == "__main__":
    main()
