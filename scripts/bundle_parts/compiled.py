"""What set-up compiled inside the checkout, which git ignores: carried, and put back into place."""

from __future__ import annotations

import shutil
from pathlib import Path

from setup_env import ROOT

from bundle_parts.parts import Part

FOLDER = "compiled"
"""Not in `site`: a package is imported from one folder, and this one is the checkout's."""
PATTERN = "hybrimoe_plugin/**/*.abi3.so"
"""For every Python from 3.10 on."""


def carry(out: Path, root: Path = ROOT) -> Part:
    """Copy what is compiled in the checkout `root` into the bundle `out`."""
    libraries = sorted(root.glob(PATTERN))
    _copy(libraries, root, out / FOLDER)
    note = (
        ""
        if libraries
        else "left out: set-up found no C compiler; numpy and ggml do the same, slower"
    )
    return Part(FOLDER, sum(library.stat().st_size for library in libraries), note)


def place(bundle: Path, root: Path = ROOT) -> list[str]:
    """Copy what a bundle carries into the checkout `root`; gives the names of the files."""
    libraries = sorted((bundle / FOLDER).glob(PATTERN))
    _copy(libraries, bundle / FOLDER, root)
    return [library.name for library in libraries]


def _copy(libraries: list[Path], source: Path, target: Path) -> None:
    for library in libraries:
        path = target / library.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a process that has it loaded keeps the old file
        shutil.copy2(library, path)
