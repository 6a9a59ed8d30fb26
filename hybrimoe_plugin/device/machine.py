"""Facts about this machine: its hardware, the versions of what computes, whether CUDA works."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from hybrimoe_plugin.device.choice import device_name
from hybrimoe_plugin.errors import BackendError

_COMPUTING_PACKAGES = ("torch", "kt-kernel", "ktransformers-hybrimoe")


def hardware() -> dict[str, str]:
    """The facts on which a profile depends: `cpu`, `cores`, `gpu` and `system`."""
    gpu = "none"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(0)
    return {
        "cpu": _cpu_name(),
        "cores": str(_usable_cores()),
        "gpu": gpu,
        "system": platform.system(),
    }


def _cpu_name() -> str:
    fallback = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return fallback
    for line in lines:
        if line.startswith("model name") and ":" in line:
            return line.split(":", 1)[1].strip()
    return fallback


def _usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Package -> version of everything that computes; `none` for what is not installed."""
    found = {"python": platform.python_version()}
    for name in _COMPUTING_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def cuda_refusal() -> str | None:
    """Why CUDA cannot be used on this machine; None if it can."""
    if not torch.backends.cuda.is_built():
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def device_refusal(name: str) -> str | None:
    """Why a CUDA device, `cuda` or `cuda:N`, cannot be used on this machine; None if it can."""
    refusal = cuda_refusal()
    if refusal is not None:
        return refusal
    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        return f"there are {count} CUDA devices, counted from 0"
    return None


def cuda_device(name: str, instead: str = "--device cpu") -> torch.device:
    """The CUDA device of a name, `cuda` or `cuda:N`.

    Args:
        instead: what the message tells to use where there is no CUDA.

    Raises:
        ConfigError: no such name.
        BackendError: CUDA cannot be used here, or there are fewer devices.
    """
    index = int(device_name(name).partition(":")[2] or 0)
    refusal = device_refusal(name)
    if refusal is not None:
        hint = "" if cuda_refusal() is None else f"; use {instead}"
        raise BackendError(f"device {name}: {refusal}{hint}")
    return torch.device("cuda", index)
