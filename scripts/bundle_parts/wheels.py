"""Wheels for the GPU machine: fetched with pip, and unpacked without what is not used there."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from email import message_from_bytes
from pathlib import Path

from bundle_parts.parts import PYTHON, BundleError

PLATFORMS = (
    "manylinux_2_35_x86_64",
    "manylinux_2_34_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux2014_x86_64",
)

VARIANTS = ("amx", "avx512_vnni", "avx2")
"""Of kt-kernel's builds. It takes the best one that the processor has and that is there: AVX512
with bfloat16 or VBMI falls back to VNNI.
"""

THERE = (
    "jinja2",
    "numpy",
    "packaging",
    "psutil",
    "pyyaml",
    "requests",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "triton",
)
"""Distributions that a GPU machine with torch and transformers has; what they need themselves is
there as well.
"""


def kept_of_kt_kernel(path: str, variants: Iterable[str]) -> bool:
    """Whether this file of kt-kernel's wheel goes into the bundle.

    The package does, without its tools, and with its builds for these processors.
    """
    if path.startswith(("kt_kernel.libs/", "kt_kernel-")):
        return "dist-info" not in path or path.endswith("/METADATA")
    if not path.startswith("kt_kernel/") or path.startswith(("kt_kernel/cli/", "kt_kernel/sft/")):
        return False
    build = re.match(r"kt_kernel/_kt_kernel_ext_(\w+?)\.", path)
    return build is None or build[1] in variants


def unpack(wheel: Path, site: Path, keep: Callable[[str], bool] = lambda _path: True) -> None:
    """The files of a wheel that are kept, in `site`."""
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if not name.endswith(("/RECORD", "/"))]
        names = [name for name in files if keep(name)]
        if not names:
            raise BundleError(f"{wheel.name} holds nothing of what is wanted")
        archive.extractall(site, names)


def needs(wheel: Path) -> set[str]:
    """Names of the distributions that a wheel requires without extras, in small letters."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    found = set()
    for item in metadata.get_all("Requires-Dist") or []:
        requirement, _, condition = item.partition(";")
        if "extra" not in condition:
            distribution, *_ = re.split(r"[\s<>=!~\[(]", requirement)
            found.add(distribution.lower())
    return found


def download(requirement: str, folder: Path) -> Path:
    """One wheel for the GPU machine's Python.

    Raises:
        BundleError: pip found none, or could not fetch it.
    """
    into = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    command += ["--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(into.glob("*.whl"))
    if done.returncode or len(found) != 1:
        reason = " ".join(done.stderr.split())[-300:]
        raise BundleError(f"pip could not fetch {requirement}: {reason}")
    return found[0]
