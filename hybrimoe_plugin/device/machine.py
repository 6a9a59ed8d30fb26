"""What this machine is: its hardware, the versions of what computes, whether CUDA works."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def hardware() -> dict[str, str]:
    """The facts on which a profile depends."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return {"cpu": cpu, "cores": str(cores), "gpu": gpu, "system": platform.system()}


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version()}
    for name in ("torch", "kt-kernel", "ktransformers-hybrimoe"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def cuda_refusal() -> str | None:
    """Why CUDA cannot be used here, None if it can."""
    if not torch.backends.cuda.is_built():
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None
