"""Whether what was unpacked can be imported as it will be on the GPU machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bundle_parts.parts import PYTHON, BundleError, Part, can

BASELINE = (
    "torch",
    "numpy",
    "yaml",
    "tqdm",
    "requests",
    "safetensors.torch",
    "rich",
    "packaging.version",
    "psutil",
)
"""Imported before a check, so that what is left over afterwards came from neither them nor the
bundle.
"""

_CHECK = """
import importlib, json, sys
site, names, baseline = json.loads(sys.argv[1])
for name in baseline:
    importlib.import_module(name)
before = set(sys.modules)
versions = {}
for name in names:
    module = importlib.import_module(name)
    versions[name] = [str(getattr(module, "__file__", "")), str(getattr(module, "__cpu_variant__", ""))]
foreign = set()
for name in set(sys.modules) - before:
    path = str(getattr(sys.modules[name], "__file__", None) or "")
    if "site-packages" in path and not path.startswith(site):
        foreign.add(name.partition(".")[0])
print(json.dumps([versions, sorted(foreign - {name.partition(".")[0] for name in before})]))
"""  # noqa: E501


def check_import(
    python: str, site: Path, names: Sequence[str], baseline: Sequence[str] = ()
) -> str:
    """Import packages from `site` in a process of its own; gives what was found, in words.

    Args:
        baseline: modules that the GPU machine has; whatever else comes from outside `site` is
            missing there.

    Raises:
        BundleError: a package does not import, is another installed one, or needs what the machine
            has not got.
    """
    folder = str(site.resolve())
    given = json.dumps([folder, list(names), list(baseline)])
    environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-s", "-c", _CHECK, given]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=site
    )
    if done.returncode:
        raise BundleError(f"the bundle does not import in {python}: {done.stderr.strip()[-500:]}")
    found, foreign = json.loads(done.stdout.splitlines()[-1])
    said = []
    for name, (path, variant) in found.items():
        if not path.startswith(folder):
            raise BundleError(f"{name} was imported from {path or 'nowhere'}, not from the bundle")
        said.append(f"{name} imports ({variant})" if variant else f"{name} imports")
    if foreign:
        raise BundleError(f"importing needs {', '.join(foreign)}, which is not in the bundle")
    return ", ".join(said)


def checked(
    python: str | None,
    site: Path,
    names: Sequence[str] = ("gguf", "kt_kernel"),
    baseline: Sequence[str] = BASELINE,
) -> Part:
    """The result of `check_import` as a line of the list of parts.

    Args:
        python: like the GPU machine's; None takes the one on the path, if it has torch.

    Raises:
        BundleError: as `check_import`.
    """
    python = python or shutil.which(f"python{PYTHON}")
    note = f"left out: no Python {PYTHON} with torch here; --python names one"
    if python is not None and can(python, ", ".join(baseline)):
        found = check_import(python, site, names, baseline)
        note = f"{found}, in {python}"
    return Part("check of the imports", 0, note)
