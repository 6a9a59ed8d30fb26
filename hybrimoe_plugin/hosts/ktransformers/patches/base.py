"""What a patch is, and the questions that patches ask about the host."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from hybrimoe_plugin.hosts.ktransformers.changes import Changes


@dataclass(frozen=True)
class Patch:
    """One change to the host."""

    name: str
    reason: str
    """What the host does without it, and what it does with it."""
    low: str
    below: str
    """For versions from `low` on, before `below`."""
    needed: Callable[[], str | None]
    """What the host lacks here, None if nothing: then the patch is left out."""
    apply: Callable[[Changes], None]

    @property
    def versions(self) -> str:
        return f">={self.low},<{self.below}"


def cannot_import(name: str) -> str | None:
    """Why a module cannot be imported, None if it can."""
    try:
        importlib.import_module(name)
    except Exception as error:  # native modules fail in many ways
        return f"no {name}: {' '.join(str(error).split())}"
    return None


def no_cuda() -> str | None:
    """Said where there is no CUDA device."""
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"
