"""Shapes and text of an SVG file that is readable on white and on black pages."""

from __future__ import annotations

from html import escape

from hybrimoe_plugin.files import printable

WIDTH = 800
"""Of a picture, in pixels: as wide as a README."""

COLOURS = {
    "accelerator": "#3d9a68",
    "memory": "#d98a2b",
    "pinned": "#8a63c9",
    "mapped": "#3f80c4",
    "disk": "#8b949e",
}
"""Kind of place -> colour, each of which stands out from white and from black."""

_BEGIN = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} '

_STYLE = """\
text { font-family: sans-serif; font-size: 13px; fill: #1f2328; }
.page { fill: #ffffff; }
.empty { fill: #e6e9ed; }
.title { font-size: 16px; font-weight: bold; }
.head { font-weight: bold; }
.small { font-size: 12px; fill: #57606a; }
.warn { fill: #c0392b; }
.end { text-anchor: end; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .page { fill: #0d1117; }
  .empty { fill: #2a3038; }
  .small { fill: #9aa4af; }
  .warn { fill: #ff7b72; }
}"""


def is_ours(head: bytes) -> bool:
    """Whether a file that begins so is one of these pictures."""
    return head.startswith(_BEGIN.encode())


def page(height: float, title: str, shapes: list[str]) -> str:
    """A whole file."""
    kinds = [f".{kind} {{ fill: {colour}; }}" for kind, colour in COLOURS.items()]
    style = "\n".join([_STYLE, *kinds])
    name = _escaped(title)
    lines = [
        f'{_BEGIN}{height:g}" width="{WIDTH}" height="{height:g}" role="img" aria-label="{name}">',
        f"<title>{name}</title>",
        f"<style>\n{style}\n</style>",
        rectangle(0, 0, WIDTH, height, "page"),
        *shapes,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A filled rectangle; `kind` is a class of the style."""
    size = f'width="{width:.1f}" height="{height:g}"'
    return f'<rect x="{x:.1f}" y="{y:g}" {size} class="{kind}"/>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of text whose base line is at `y`."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:g}"{named}>{_escaped(words)}</text>'


def _escaped(words: str) -> str:
    # XML has no way to write control characters or halves of characters.
    return escape(printable(words))
