"""What identifies a cache of compiled kernels."""

from __future__ import annotations

import hashlib
import inspect
import sysconfig
from pathlib import Path
from typing import Any

from hybrimoe_plugin import compute

DESCRIPTION = "gpu/kernels/formats/description.py"
"""What the kernels are made of besides; it holds none."""


def kernel_files() -> list[Path]:
    """Modules that hold the kernels' source, in an order of their own."""
    folder = Path(inspect.getfile(compute)).parent
    found = {folder / DESCRIPTION}
    found |= {path for path in folder.rglob("*.py") if "@triton." in path.read_text("utf-8")}
    return sorted(found)


def facts(arch: int) -> dict[str, Any]:
    """What has to be the same on a machine that uses the cache."""
    from triton import __version__
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    sources = [path.read_bytes() for path in kernel_files()]
    return {
        "arch": arch,
        "triton": __version__,
        "triton_files": _digest(triton_key().encode()),
        "ptxas": _digest(get_ptxas_version(arch).encode()),
        "kernels": _digest(b"".join(sources)),
        "python_suffix": str(sysconfig.get_config_var("EXT_SUFFIX")),
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
