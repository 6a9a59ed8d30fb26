"""What identifies a cache of compiled kernels."""

from __future__ import annotations

import hashlib
import inspect
import sysconfig
from pathlib import Path
from typing import Any

from hybrimoe_plugin.compute.gpu.kernels.base import Kernels

KERNEL_FILES = (
    "decode",
    "epilogue",
    "formats/codes",
    "formats/description",
    "formats/facts",
    "formats/fields",
    "formats/grids",
    "formats/scales",
    "linear",
    "prefill",
    "repack",
)
"""Modules that hold the kernels' source."""


def facts(arch: int) -> dict[str, Any]:
    """What has to be the same on a machine that uses the cache."""
    from triton import __version__
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    folder = Path(inspect.getfile(Kernels)).parent
    sources = [(folder / f"{name}.py").read_bytes() for name in KERNEL_FILES]
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
