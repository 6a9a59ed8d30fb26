"""Print figures about the code: sizes of files and functions, density, comments, full folders.

    python scripts/code_figures.py                prints a table
    python scripts/code_figures.py --check        exits with 1 if a limit is exceeded

Needs Python's standard library only. Density is the number of nodes in a file's syntax tree divided
by its non-blank lines: dense lines hold several ideas each.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hybrimoe_plugin", "lever_ext", "eval", "tests")
DENSE = ("hybrimoe_plugin", "lever_ext", "eval")
"""Packages whose density has a limit."""
MOST_LINES = 350
MOST_MODULES = 14
"""In one folder, without `__init__.py`."""
MOST_NODES = 7.5
"""Median over a package's files, per non-blank line."""
FEWEST_LINES = 5
"""Shorter files, such as most `__init__.py`, have no density."""
FULL = ("hybrimoe_plugin/cli", "hybrimoe_plugin/families")
"""Folders that may have more modules: each is one command or one model family."""


@dataclass(frozen=True)
class Module:
    """One file.

    Args:
        path: below the root, with forward slashes.
        lines: of the file, blank ones included.
        widths: of all lines, in characters.
        functions: lines of each function.
        nodes: in the syntax tree.
        filled: non-blank lines.
        comments: number of comments.
    """

    path: str
    lines: int
    widths: tuple[int, ...]
    functions: tuple[int, ...]
    nodes: int
    filled: int
    comments: int

    @property
    def density(self) -> float:
        """Nodes per non-blank line."""
        return self.nodes / self.filled

    @property
    def folder(self) -> str:
        """The folder that the file lies in, below the root."""
        return self.path.rpartition("/")[0]


def read(path: Path, root: Path) -> Module:
    """Measure one file.

    Raises:
        SyntaxError: it is not Python.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    functions = []
    nodes = 0
    for node in ast.walk(ast.parse(text)):
        nodes += 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            last = node.end_lineno or node.lineno
            functions.append(last - node.lineno + 1)
    return Module(
        path=path.relative_to(root).as_posix(),
        lines=len(lines),
        widths=tuple(len(line) for line in lines),
        functions=tuple(functions),
        nodes=nodes,
        filled=sum(1 for line in lines if line.strip()),
        comments=_comments(text),
    )


def _comments(text: str) -> int:
    """Number of comments."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(1 for token in tokens if token.type == tokenize.COMMENT)


def modules(root: Path, package: str) -> list[Module]:
    """All files of a package, in the order of their names."""
    paths = sorted((root / package).rglob("*.py"))
    return [read(path, root) for path in paths]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed; 0 for none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = int(share * (len(ordered) - 1) + 0.5)
    return ordered[place]


def density(found: Sequence[Module]) -> float:
    """Median of the files' nodes per non-blank line; 0 if all are very short."""
    values = [module.density for module in found if module.filled >= FEWEST_LINES]
    return median(values) if values else 0.0


def full_folders(found: Sequence[Module]) -> dict[str, int]:
    """Folders with too many modules, and how many they have."""
    folders = [module.folder for module in found if not module.path.endswith("/__init__.py")]
    counts = Counter(folders)
    full = [folder for folder in counts if counts[folder] > MOST_MODULES]
    return {folder: counts[folder] for folder in full if folder not in FULL}


def long_files(found: Sequence[Module]) -> list[Module]:
    """Files with too many lines."""
    return [module for module in found if module.lines > MOST_LINES]


def figures(found: Sequence[Module]) -> dict[str, str]:
    """The table's lines for one package: name -> value."""
    sizes = [module.lines for module in found]
    functions: list[int] = []
    widths: list[int] = []
    filled = nodes = comments = 0
    for module in found:
        functions += module.functions
        widths += [width for width in module.widths if width]
        filled += module.filled
        nodes += module.nodes
        comments += module.comments
    lines = sum(sizes)
    overall = nodes / max(1, filled)
    commented = 100 * comments / max(1, lines)
    return {
        "files": str(len(found)),
        "lines": str(lines),
        "lines per file, median / p90 / max": _three(sizes),
        "lines per function, median / p90 / max": _three(functions),
        "nodes per non-blank line, median file": f"{density(found):.1f}",
        "nodes per non-blank line, all": f"{overall:.1f}",
        "line width, p90": f"{percentile(widths, 0.9):.0f}",
        "comments per 100 lines": f"{commented:.1f}",
        f"folders above {MOST_MODULES} modules": str(len(full_folders(found))),
        f"files above {MOST_LINES} lines": str(len(long_files(found))),
    }


def _three(sizes: Sequence[int]) -> str:
    """Median, 90th percentile and largest value."""
    middle = median(sizes) if sizes else 0
    return f"{middle:g} / {percentile(sizes, 0.9):g} / {max(sizes, default=0)}"


def problems(root: Path, packages: Sequence[str] = PACKAGES) -> list[str]:
    """What exceeds a limit, one line each."""
    found = []
    for package in packages:
        read_in = modules(root, package)
        for module in long_files(read_in):
            found.append(f"{module.path}: {module.lines} lines, at most {MOST_LINES} are allowed")
        for folder, count in full_folders(read_in).items():
            found.append(f"{folder}: {count} modules, at most {MOST_MODULES} are allowed")
        nodes = density(read_in)
        if package in DENSE and nodes > MOST_NODES:
            found.append(
                f"{package}: {nodes:.2f} nodes per non-blank line in the median file, at most "
                f"{MOST_NODES} are allowed"
            )
    return found


def show(root: Path, packages: Sequence[str] = PACKAGES) -> None:
    """Print a table with a column for each package."""
    columns = [figures(modules(root, package)) for package in packages]
    width = max(len(name) for name in columns[0])
    print(" " * width, *(f"{package:>16}" for package in packages))
    for name in columns[0]:
        print(f"{name:{width}}", *(f"{column[name]:>16}" for column in columns))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; the exit status is 1 if a limit is exceeded and `--check` was given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is exceeded")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout (default: this one)")
    args = parser.parse_args(arguments)
    show(args.root)
    found = problems(args.root)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if args.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
