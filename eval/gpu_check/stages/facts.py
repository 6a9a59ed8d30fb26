"""What is there: memory, disk, kernel packages, and whether the driver registers pages."""

from __future__ import annotations

import mmap
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.gpu_check.place import Place, Row
from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel
from hybrimoe_plugin.compute.cpu.native.kernels import compiled
from hybrimoe_plugin.compute.gpu.host_bytes import (
    PORTABLE,
    READ_ONLY_PORTABLE,
    as_tensor,
    register_pages,
)
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.device.memory import free_host_bytes, huge_pages
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.policy.cache import adaptive

REGISTERED_BYTES = 1 << 30
_FLAGS = {"read-only": READ_ONLY_PORTABLE, "read and write": PORTABLE}
"""In the order in which the product tries them."""
_GB = 1e9


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    refusal = None if place.dry else cuda_refusal()
    yield {
        "case": "torch sees the card",
        "ok": None if place.dry else refusal is None,
        "detail": refusal or "",
    }
    yield {"case": "host memory", "free_gb": free_host_bytes() / _GB}
    yield {"case": "scratch folder", "free_gb": shutil.disk_usage(place.scratch).free / _GB}
    yield _kt_kernel()
    yield _cache_learning()
    yield _operations()
    if place.dry:
        yield {"case": "page registration", "ok": None, "missing": "a CUDA driver"}
        return
    free, total = torch.cuda.mem_get_info(place.device)
    yield {"case": "device memory", "free_gb": free / _GB, "total_gb": total / _GB}
    facts = torch.cuda.get_device_properties(place.device)
    yield {
        "case": "device",
        "multiprocessors": facts.multi_processor_count,
        "l2_mb": facts.L2_cache_size / 1e6,
    }
    yield _registration(place, "pages of anonymous memory", _anonymous)
    yield _registration(place, "pages of a mapped file", lambda: _mapping(place.scratch))


def _kt_kernel() -> Row:
    try:
        module = import_kernel()
    except BackendError as error:
        return {
            "case": "kt-kernel",
            "ok": None,
            "missing": f"kt-kernel ({error}): experts on the CPU would be slow",
        }
    return {"case": "kt-kernel", "ok": True, "detail": Path(str(module.__file__)).name}


def _cache_learning() -> Row:
    if adaptive.learn_token is None:
        return {
            "case": "cache learning",
            "ok": None,
            "missing": "one_token.c, compiled: the cache learns in numpy, 20 us a layer slower",
        }
    return {"case": "cache learning", "ok": True, "detail": "in C"}


def _operations() -> Row:
    if not compiled():
        return {
            "case": "operations",
            "ok": None,
            "missing": "the CPU's operations, compiled: ggml's graphs compute, which are slower",
        }
    return {"case": "operations", "ok": True, "detail": "in C"}


def _registration(place: Place, what: str, make: Callable[[], mmap.mmap]) -> Row:
    """Register 1 GiB, copy it to the device, and measure both.

    A refusal is a fact, not a fault.
    """
    try:
        memory = make()
    except OSError as error:
        return {"case": what, "missing": f"room for {REGISTERED_BYTES >> 20} MiB: {error}"}
    values = np.frombuffer(memory, dtype=np.uint8)
    values[:: mmap.PAGESIZE].sum()  # the pages are there before the clock starts
    started = time.perf_counter()
    accepted = _register(values, place.device)
    spent = time.perf_counter() - started
    row: dict[str, Any] = {
        "case": what,
        "accepted": accepted or "neither",
        "register_gbps": values.size / spent / _GB,
    }
    if accepted is not None:
        row["copy_gbps"] = _copy_gbps(values, place.device)
        torch.cuda.cudart().cudaHostUnregister(values.ctypes.data)
    return row


def _register(values: NDArray[np.uint8], device: torch.device) -> str | None:
    """Register pages with the driver; gives the name of the flags that it accepted."""
    for name, flags in _FLAGS.items():
        if register_pages(values.ctypes.data, values.size, flags, device):
            return name
    return None


def _copy_gbps(values: NDArray[np.uint8], device: torch.device) -> float:
    source = as_tensor(values)
    target = torch.empty(values.size, dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    spent = time.perf_counter() - started
    return float(values.size / spent / _GB)


def _anonymous() -> mmap.mmap:
    memory = huge_pages(REGISTERED_BYTES)
    values = np.frombuffer(memory, dtype=np.uint8)
    values[:: mmap.PAGESIZE] = 1  # pages that were only read are all the same one
    return memory


def _mapping(folder: Path) -> mmap.mmap:
    """A read-only mapping of a file, as weights are.

    It is private and never written, so numpy may call it read-only.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(REGISTERED_BYTES >> 26):
            file.write(bytes(1 << 26))
        file.flush()
        return mmap.mmap(file.fileno(), REGISTERED_BYTES, access=mmap.ACCESS_READ)
