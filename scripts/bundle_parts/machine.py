"""On the GPU machine: make a bundle usable that was carried there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from setup_env import ROOT

from bundle_parts import compiled
from bundle_parts.kernels import relocate
from bundle_parts.parts import BundleError, say, shown

ACTIVATE = """# Source this in the root of a checkout of the commit that the bundle was built from.
eval "$(python scripts/gpu_bundle.py --use "$(dirname "${BASH_SOURCE[0]:-$0}")")"
"""


def use(bundle: Path) -> None:
    """Make a bundle that was carried here usable, and print what the shell has to know.

    Raises:
        BundleError: there is no bundle.
    """
    bundle = bundle.resolve()
    site = bundle / "site"
    cache = bundle / "triton"
    manifest = bundle / "manifest.json"
    if not site.is_dir():
        raise BundleError(f"{bundle} holds no bundle: there is no {site.name} in it")
    paths = f"{shlex.quote(str(site))}:{shlex.quote(str(ROOT))}"
    print(f"export PYTHONPATH={paths}${{PYTHONPATH:+:$PYTHONPATH}}")
    for name in compiled.place(bundle):
        say(f"{name} put into the checkout")
    if cache.is_dir() and manifest.exists():
        say(f"{relocate(cache)} compiled kernels in {shown(cache)}")
        print(f"export TRITON_CACHE_DIR={shlex.quote(str(cache))}")
        made = json.loads(manifest.read_text(encoding="utf-8"))
        say(fits(made, _facts(made["arch"], site)))


def _facts(arch: int, site: Path) -> dict[str, Any]:
    """What this machine's Triton says of itself; empty if it cannot be asked."""
    code = (
        "import json; from eval.kernel_prebuild.facts import facts; "
        f"print(json.dumps(facts({arch})))"
    )
    paths = (str(site), str(ROOT), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def fits(made: dict[str, Any], here: dict[str, Any]) -> str:
    """Whether kernels compiled there will be found here, in words."""
    if not here:
        return (
            "Triton cannot be asked here: whether the compiled kernels are used shows only "
            "when they are called"
        )
    other = []
    for name, value in here.items():
        if name != "python_suffix" and made.get(name) != value:
            other.append(f"{name} ({made.get(name)} there, {value} here)")
    if other:
        return f"kernels will be compiled again, since these differ: {', '.join(other)}"
    if made.get("python_suffix") != here["python_suffix"]:
        return (
            "the compiled kernels fit; their launchers are for another Python and will be "
            "built again"
        )
    return "the compiled kernels fit this machine's Triton"
