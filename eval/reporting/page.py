"""The report of all questions: one HTML file that needs no network, for any screen."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.reporting import report
from eval.reporting.answers import QUESTIONS
from eval.reporting.tables import columns_of

_ROWS = 40
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --ground: #ffffff; --box: #f6f8fa; --link: #0969da; --bad: #b00020; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --ground: #0d1117; --box: #151b23; --link: #4493f8; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 56rem; margin: 0 auto;
  padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--ground); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 3rem; }
a { color: var(--link); }
nav { background: var(--box); border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem 1rem; }
nav ul { padding-left: 1.2rem; margin: .4rem 0; }
.facts, figcaption, summary { color: var(--soft); font-size: .85rem; }
.answer { font-weight: 600; }
figure { margin: 1rem 0; } img { width: 100%; height: auto; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .8rem; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { background: var(--box); } .text { text-align: left; }
pre { background: var(--box); padding: .6rem; overflow-x: auto; font-size: .75rem; }
.failed { color: var(--bad); }
"""


class Answer(NamedTuple):
    """What a question left behind."""

    question: str
    seconds: float
    result: dict[str, Any] | None
    """Its JSON line; None where it failed."""
    output: str
    files: tuple[Path, ...]


def page(answers: Sequence[Answer], quick: bool) -> str:
    """The page: contents, then a section for each question."""
    facts = ", ".join(f"{key} {value}" for key, value in report.facts().items() if value != "none")
    kind = "A quick look, with few repetitions" if quick else "A full run"
    links = []
    for answer in answers:
        title = html.escape(QUESTIONS[answer.question].title)
        links.append(f'<li><a href="#{answer.question}">{title}</a></li>')
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>HybriMoE evaluation</title><style>{_STYLE}</style></head><body>",
        f"<h1>HybriMoE evaluation</h1><p>{kind}. Numbers are measured on this machine unless "
        f"they are called simulated or emulated.</p>",
        f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>',
        f'<p class="facts">{html.escape(facts)}</p>',
    ]
    for answer in answers:
        parts += _section(answer)
    return "\n".join(parts) + "</body></html>\n"


def _section(answer: Answer) -> list[str]:
    question = QUESTIONS[answer.question]
    parts = [
        f'<section id="{answer.question}"><h2>{html.escape(question.title)}</h2>',
        f"<p>{html.escape(question.asks)} {_said(answer)}</p>",
    ]
    parts += [_figure(path) for path in answer.files if path.suffix == ".png"]
    parts += [_csv(path) for path in answer.files if path.suffix == ".csv"]
    if answer.result is not None:
        summary = "<summary>its JSON line</summary>"
        parts.append(f"<details>{summary}{_table([answer.result])}</details>")
    else:
        parts.append(f"<pre>{html.escape(answer.output[-4000:])}</pre>")
    parts.append(
        f'<p class="facts"><code>python -m eval.{answer.question}</code>, '
        f"{answer.seconds:.0f} s</p></section>"
    )
    return parts


def _said(answer: Answer) -> str:
    """The answer in a sentence or two."""
    if answer.result is None:
        text = f"It failed after {answer.seconds:.0f} s; what it printed is below."
        return f'<span class="failed">{text}</span>'
    try:
        said = QUESTIONS[answer.question].says(answer.result)
    except (KeyError, TypeError):  # a run that was cut short
        said = "The run left too little for an answer in one sentence."
    return f'<span class="answer">{html.escape(said)}</span>'


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.stem.replace("_", " "))
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>'


def _csv(path: Path) -> str:
    rows = _rows(path)
    title = html.escape(path.name)
    if len(rows) > _ROWS:
        title += f", first {_ROWS} of {len(rows)} rows"
    return f"<details><summary>{title}</summary>{_table(rows[:_ROWS])}</details>"


def _rows(path: Path) -> list[dict[str, Any]]:
    """A CSV's rows without the facts about the machine, which the page's head gives."""
    known = set(report.facts())
    rows = report.read_csv(path)
    return [{name: value for name, value in row.items() if name not in known} for row in rows]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A table that scrolls in a box of its own; columns of zeros are left out."""
    if not rows:
        return "<p>no rows</p>"
    columns = [column for column in columns_of(rows) if column.says_something]
    heads = [(column.heading, column.is_text) for column in columns]
    lines = [_line("th", heads)]
    for place in range(len(rows)):
        lines.append(_line("td", [(column.cells[place], column.is_text) for column in columns]))
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _line(tag: str, cells: Sequence[tuple[str, bool]]) -> str:
    """One line of a table; a cell is (text, whether it stands left)."""
    made = []
    for text, is_text in cells:
        style = ' class="text"' if is_text else ""
        made.append(f"<{tag}{style}>{html.escape(text)}</{tag}>")
    return f"<tr>{''.join(made)}</tr>"
