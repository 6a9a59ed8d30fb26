"""Memory of this machine: what is free, huge pages, and refusing what does not fit."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path
from typing import NamedTuple

import psutil

from hybrimoe_plugin.errors import BudgetError
from hybrimoe_plugin.files import human as human

RESERVE = 0.1
"""Share of free accelerator memory that stays free for activations and fragmentation."""

_CGROUPS = Path("/sys/fs/cgroup")


class _Group(NamedTuple):
    """Files of one version of control groups that state a container's limit and use."""

    limit: str
    used: str
    stat: str
    cached: tuple[str, ...]
    """Lines of `stat`, in bytes: cached pages of files, which the kernel can reclaim."""
    dirty: str
    """Line of `stat`: the cached pages that must be written to disk first."""


_GROUPS = (
    _Group(
        "memory.max",
        "memory.current",
        "memory.stat",
        ("inactive_file", "active_file"),
        "file_dirty",
    ),
    _Group(
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
        "total_dirty",
    ),
)


def free_host_bytes(root: Path = _CGROUPS) -> int:
    """Memory that can still be taken on the host; a container's limit is respected.

    Args:
        root: where control groups are mounted, of version 2 or 1.
    """
    free = int(psutil.virtual_memory().available)
    for group in _GROUPS:
        # Not this version of control groups, or no limit ("max").
        with contextlib.suppress(OSError, ValueError):
            free = min(free, _free_in(root, group))
    return max(0, free)


def _free_in(root: Path, group: _Group) -> int:
    """What a container may still take.

    Its cached pages of files count as free: a mapped model would seem to fill it otherwise.

    Raises:
        OSError, ValueError: there is no such group, or it has no limit.
    """
    limit = int((root / group.limit).read_text())
    used = int((root / group.used).read_text())
    return limit - used + _reclaimable(root, group)


def _reclaimable(root: Path, group: _Group) -> int:
    try:
        words = (root / group.stat).read_text().split()
        stat = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    except (OSError, ValueError):  # a sandbox may show the limit alone
        return 0
    cached = sum(stat.get(name, 0) for name in group.cached)
    return max(0, cached - stat.get(group.dirty, 0))


def huge_pages(nbytes: int) -> mmap.mmap:
    """Zeroed anonymous host memory, on huge pages where the kernel gives them.

    It is private: shared anonymous memory gets huge pages only where `shmem_enabled` says so,
    which is rare.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def check_host(needed_bytes: int, what: str, free_bytes: int | None = None) -> None:
    """Refuse, before anything is loaded, what the host cannot hold.

    Args:
        what: plural noun for the message, such as `the weights`.

    Raises:
        BudgetError: it does not fit; the message has both numbers.
    """
    free = free_host_bytes() if free_bytes is None else free_bytes
    if needed_bytes > free:
        raise BudgetError(f"{what} need {human(needed_bytes)} of memory, {human(free)} are free")
