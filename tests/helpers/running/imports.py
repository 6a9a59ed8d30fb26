"""Who imports whom, read from the sources: every import counts, wherever in a file it stands."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]


def modules(root: Path, packages: Iterable[str]) -> dict[str, Path]:
    """Dotted name -> file of every module of these packages.

    A package is named like its folder.
    """
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            relative = path.relative_to(root).with_suffix("")
            parts = relative.parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join(parts)] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> set[str]:
    """The known modules that a file imports: at its top, inside functions and for type checks."""
    found: set[str] = set()
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [alias.name for alias in node.names]
            found |= _imported_from(node.module, names, known)
    return found & known.keys()


def _imported_from(module: str, names: Iterable[str], known: Mapping[str, Path]) -> set[str]:
    """What `from module import names` imports: its submodules, and itself for other names."""
    found = set()
    for name in names:
        submodule = f"{module}.{name}"
        found.add(submodule if submodule in known else module)
    return found


def file_graph(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    graph = {}
    for name, path in known.items():
        graph[name] = imported(path, known) - {name}
    return graph


def package_graph(files: Graph, known: Mapping[str, Path]) -> dict[str, set[str]]:
    """Package -> the packages that its files import. A package and one inside it are no pair."""

    def package(name: str) -> str:
        if known[name].name == "__init__.py":
            return name
        return name.rpartition(".")[0]

    found: dict[str, set[str]] = {package(name): set() for name in known}
    for name, others in files.items():
        own = package(name)
        for other in others:
            theirs = package(other)
            if not _inside(own, theirs) and not _inside(theirs, own):
                found[own].add(theirs)
    return found


def _inside(package: str, outer: str) -> bool:
    """Whether a package is another one, or lies inside it."""
    return f"{package}.".startswith(f"{outer}.")


def circles(graph: Graph) -> list[list[str]]:
    """Groups of more than one node that all reach one another."""
    reach = {name: _reachable(graph, name) for name in graph}
    found = []
    seen: set[str] = set()
    for name in graph:
        if name in seen:
            continue
        group = {name}
        for other in reach[name]:
            if name in reach[other]:
                group.add(other)
        if len(group) > 1:
            found.append(sorted(group))
            seen |= group
    return found


def _reachable(graph: Graph, start: str) -> set[str]:
    """The nodes that can be reached from one; itself only through others."""
    waiting = [start]
    seen: set[str] = set()
    while waiting:
        node = waiting.pop()
        new = graph[node] - seen
        seen |= new
        waiting.extend(new)
    return seen
