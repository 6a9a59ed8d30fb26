"""Every question in turn, and one HTML report of all tables and figures.

A question that fails does not stop the others: the report says what it printed, and the exit status
is 1.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from eval.reporting import report

QUESTIONS = ("schedule", "cache", "prefetch", "replay", "throughput", "fidelity", "lever", "flips")
LIMIT_S = {True: 900, False: 7200}
"""Longest time for one question, quick and full."""
_ROWS = 40
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: 12px; }
.failed { color: #b00020; }
"""  # noqa: E501


class Answer(NamedTuple):
    """What a question left behind."""

    question: str
    seconds: float
    result: dict[str, Any] | None
    """Its JSON line; None where it failed."""
    output: str
    files: tuple[Path, ...]


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


def page(answers: Sequence[Answer], quick: bool) -> str:
    """One self-contained HTML page: results, tables, figures."""
    facts = ", ".join(f"{key} {value}" for key, value in report.facts().items())
    kind = "quick look, few repetitions" if quick else "full run"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>HybriMoE "
        f"evaluation</title><style>{_STYLE}</style>",
        f"<h1>HybriMoE evaluation</h1><p>{html.escape(facts)} ({kind})</p>",
        "<p>Numbers are measured on this machine unless their table says simulated or "
        "emulated.</p>",
    ]
    for answer in answers:
        parts += _section(answer)
    return "\n".join(parts) + "</html>\n"


def _section(answer: Answer) -> list[str]:
    parts = [f"<h2 id={answer.question}>{answer.question}</h2>"]
    if answer.result is None:
        parts.append(f"<p class=failed>failed after {answer.seconds:.0f} s</p>")
        parts.append(f"<pre>{html.escape(answer.output[-4000:])}</pre>")
    else:
        parts.append(f"<p>{answer.seconds:.0f} s</p>{_table([answer.result])}")
    for path in answer.files:
        if path.suffix == ".png":
            parts.append(_image(path))
        elif path.suffix == ".csv":
            parts.append(_csv(path))
    return parts


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _csv(path: Path) -> str:
    rows = _rows(path)
    title = html.escape(path.stem)
    if len(rows) > _ROWS:
        title += f", first {_ROWS} of {len(rows)} rows"
    return f"<h3>{title}</h3>{_table(rows[:_ROWS])}"


def _rows(path: Path) -> list[dict[str, Any]]:
    """A CSV's rows without the facts about the machine, which the page's head gives."""
    known = set(report.facts())
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in known & set(row):
            del row[name]
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "<p>no rows</p>"
    lines = [_line("th", [str(name) for name in rows[0]])]
    for row in rows:
        lines.append(_line("td", [_short(value) for value in row.values()]))
    return f"<table>{''.join(lines)}</table>"


def _line(tag: str, texts: Sequence[str]) -> str:
    """One line of a table, with a cell for each text."""
    cells = [f"<{tag}>{html.escape(text)}</{tag}>" for text in texts]
    return f"<tr>{''.join(cells)}</tr>"


def _short(value: Any) -> str:
    """Numbers with four significant digits, others as they are."""
    if isinstance(value, bool):
        return str(value)
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)


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
