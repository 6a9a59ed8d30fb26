"""Compile groups of cases in this process, and what identifies the result."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.kernel_prebuild.driver import Count, make_driver
from eval.kernel_prebuild.groups import AnyCase
from eval.kernel_prebuild.launch import launch
from hybrimoe_plugin.experts.kernels.base import Kernels

log = logging.getLogger(__name__)

KERNEL_FILES = ("decode", "formats", "linear", "prefill", "repack")
"""Modules that hold the kernels' source."""


def build(
    share: Sequence[tuple[str, list[AnyCase]]],
    cache: Path,
    arch: int,
    library_path: Path | None,
    deadline: float,
) -> tuple[Count, list[str]]:
    """Compile groups in this process, which can have no other driver afterwards.

    Args:
        deadline: no group is begun after it, as `time.time` counts.

    Returns:
        what happened, and the names of the groups that there was no time for.
    """
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime.driver import driver

    count = Count()
    driver.set_active(make_driver(arch, library_path, count))
    for number, (name, group) in enumerate(share):
        if time.time() > deadline:
            return count, [name for name, _ in share[number:]]
        compiled_before, hits_before = len(count.compiled), count.hits
        begun = time.monotonic()
        for case in group:
            _compile(case, count)
        built = len(count.compiled) - compiled_before
        hits = count.hits - hits_before
        spent = time.monotonic() - begun
        said = f"  {name}: {built} kernels compiled, {hits} found, {spent:.0f} s"
        print(said, file=sys.stderr, flush=True)
    return count, []


def _compile(case: AnyCase, count: Count) -> None:
    """Compile one case's kernels; tuning passes over a tile that does not compile."""
    try:
        launch(case)
    except Exception as error:
        log.debug("%s: %s", case.name, error, exc_info=True)
        count.failed.append(f"{case.name}: {type(error).__name__}: {error}")


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
