"""Who imports whom, read from the sources: every import counts, wherever in a file it stands."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]


def modules(root: Path, packages: Iterable[str]) -> dict[str, Path]:
    """Dotted name -> file of every module of these packages; a package is named like its folder."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> set[str]:
    """The known modules that a file imports: at its top, inside functions and for type checks."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            of_package = {alias.name for alias in node.names} - {
                name.rpartition(".")[2] for name in submodules
            }
            found |= submodules
            if of_package:
                found.add(node.module)
    return found & known.keys()


def file_graph(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    return {name: imported(path, known) - {name} for name, path in known.items()}


def package_graph(files: Graph, known: Mapping[str, Path]) -> dict[str, set[str]]:
    """Package -> the packages that its files import. A package and one inside it are no pair."""

    def package(name: str) -> str:
        return name if known[name].name == "__init__.py" else name.rpartition(".")[0]

    found: dict[str, set[str]] = {package(name): set() for name in known}
    for name, others in files.items():
        own = package(name)
        for other in map(package, others):
            if not f"{own}.".startswith(f"{other}.") and not f"{other}.".startswith(f"{own}."):
                found[own].add(other)
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Groups of more than one node that all reach one another."""
    reach = {name: set(_reachable(graph, name)) for name in graph}
    found, seen = [], set[str]()
    for name in graph:
        group = sorted(other for other in reach[name] if name in reach[other])
        if len({*group, name}) > 1 and name not in seen:
            found.append(sorted({*group, name}))
            seen |= {*group, name}
    return found


def _reachable(graph: Graph, start: str) -> Iterator[str]:
    waiting, seen = [start], set[str]()
    while waiting:
        for other in graph[waiting.pop()]:
            if other not in seen:
                seen.add(other)
                waiting.append(other)
                yield other
