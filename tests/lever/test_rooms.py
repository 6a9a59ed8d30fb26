"""The rooms of lever_ext: imports point one way, in the order that its docstring states."""

from __future__ import annotations

import re
from pathlib import Path

from imports import file_graph, modules

import lever_ext

ROOT = Path(lever_ext.__file__).resolve().parents[1]
ROOMS = re.findall(r"^    (\w+) {2,}\S", lever_ext.__doc__ or "", re.MULTILINE)
"""From the ground up. The examples in the docstring have no line of this form."""


def test_every_room_is_named() -> None:
    folder = ROOT / "lever_ext"
    found = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert sorted(ROOMS) == sorted(found - {"__init__", "__pycache__"})


def test_imports_point_one_way() -> None:
    wrong = []
    for module, others in file_graph(modules(ROOT, ["lever_ext"])).items():
        for other in others:
            if "lever_ext" in (module, other):
                # The package's own names, which it looks up when somebody asks.
                continue
            own, theirs = (ROOMS.index(name.split(".")[1]) for name in (module, other))
            if theirs > own:
                wrong.append(f"{module} imports {other}")
    assert not wrong, wrong


def test_no_room_is_crowded() -> None:
    for folder in (ROOT / "lever_ext", *(ROOT / "lever_ext").iterdir()):
        if folder.is_dir():
            files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(files) <= 14, folder
