"""Every question in turn, and one HTML report of all tables and figures.

A question that fails does not stop the others: the report says what it printed, and the exit status
is 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.reporting import report
from eval.reporting.answers import QUESTIONS as ASKED
from eval.reporting.page import Answer, page

QUESTIONS = tuple(ASKED)
LIMIT_S = {True: 900, False: 7200}
"""Longest time for one question, quick and full."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all questions; the exit status is 1 if one failed."""
    parser = report.parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, help="these questions only")
    args = parser.parse_args(arguments)
    asked = args.only or QUESTIONS
    answers = []
    with tqdm(total=len(asked), unit="question", file=sys.stderr) as bar:
        for name in asked:
            bar.set_description(name)
            answer = ask(name, args.out / name, args.quick)
            answers.append(answer)
            state = "failed" if answer.result is None else "done"
            tqdm.write(f"{name}: {state} after {answer.seconds:.0f} s", file=sys.stderr)
            bar.update()
    path = args.out / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(answers, args.quick), encoding="utf-8")
    failed = [answer.question for answer in answers if answer.result is None]
    total = sum(answer.seconds for answer in answers)
    report.finish({"report": str(path), "seconds": round(total, 1), "failed": failed})
    return 1 if failed else 0


def ask(question: str, out: Path, quick: bool) -> Answer:
    """Run one question in a process of its own."""
    command = [sys.executable, "-m", f"eval.{question}", "--out", str(out)]
    if quick:
        command.append("--quick")
    started = time.monotonic()
    before = time.time() - 1
    result = None
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S[quick],
            cwd=report.ROOT,
        )
        output = done.stdout
        if done.returncode:
            output += f"\n{done.stderr}"
        else:
            result = _last_json(done.stdout)
    except subprocess.TimeoutExpired as error:
        output = f"stopped after {error.timeout:.0f} s"
    made = [path for path in sorted(out.glob("*")) if path.stat().st_mtime >= before]
    return Answer(question, time.monotonic() - started, result, output, tuple(made))


def _last_json(text: str) -> dict[str, Any] | None:
    """The question's result: its last line."""
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) else None


if __name__ == "__main__":
    sys.exit(main())
