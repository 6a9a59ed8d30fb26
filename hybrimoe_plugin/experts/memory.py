"""How much fits: pure sums over bytes, and what this machine has free."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.errors import BudgetError

STAGING_SLOTS = 4
"""Two waves of two demand loads: one is computed while the other arrives. The fewest that a run can
do with.
"""

MOST_STAGING_SLOTS = 32
"""Long prompts stream whole layers through the staging slots: larger waves cost fewer launches."""

RESERVE = 0.1
"""Share of free accelerator memory that is left alone for activations and fragmentation."""

_CGROUPS = Path("/sys/fs/cgroup")

DEFAULT_EMULATED_RATIO = 0.25
"""Cache ratio of the emulated accelerator, which has no memory of its own to size it by: the
papers' smallest.
"""


def human(size: float) -> str:
    """`1.5 GiB` for 1610612736."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class _Group(NamedTuple):
    """Where one version of control groups says what a container may take and has taken."""

    limit: str
    used: str
    stat: str
    cached: tuple[str, ...]
    """Lines of `stat`, in bytes: pages of files, which the kernel takes back when memory is asked
    for.
    """
    dirty: str
    """The part of them that must be written first."""


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
    """Memory that can still be taken on the host; a container's limit counts.

    Args:
        root: where control groups are mounted, of version 2 or 1.
    """
    free = int(psutil.virtual_memory().available)
    for group in _GROUPS:
        with contextlib.suppress(OSError, ValueError):  # not this version, or no limit ("max")
            free = min(free, _free_in(root, group))
    return max(0, free)


def _free_in(root: Path, group: _Group) -> int:
    """What a container may still take, its cached pages of files counted as free: a mapped model
    would seem to fill it.

    Raises:
        OSError, ValueError: there is no such group, or it has no limit.
    """
    limit, used = (int((root / name).read_text()) for name in (group.limit, group.used))
    return limit - used + _reclaimable(root, group)


def _reclaimable(root: Path, group: _Group) -> int:
    try:
        words = (root / group.stat).read_text().split()
        stat = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    except (OSError, ValueError):  # a sandbox may show the limit alone
        return 0
    return max(0, sum(stat.get(name, 0) for name in group.cached) - stat.get(group.dirty, 0))


def huge_pages(nbytes: int) -> mmap.mmap:
    """Host memory of its own, zeroed, from huge pages where the kernel has them.

    Private, as shared anonymous memory gets huge pages only where `shmem_enabled` says so, which is
    rare.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def staging_slots(slots: int) -> int:
    """Staging slots beside about `slots` cached experts: a sixteenth of them, within limits."""
    return max(STAGING_SLOTS, min(MOST_STAGING_SLOTS, slots // 16))


def kv_cache_bytes(config: Any, context: int, latent: bool = False) -> int:
    """Memory that attention keeps for `context` tokens of one sequence, all layers, 16-bit values.

    Args:
        config: a transformers model config; what it does not say counts as nothing.
        latent: latent attention keeps latents, and prompts expand those of one layer at a time.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return 0
    layers = int(config.num_hidden_layers)
    if getattr(config, "kv_lora_rank", None):  # DeepSeek's
        expanded = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        rows = config.kv_lora_rank + config.qk_rope_head_dim
        values = layers * rows + expanded if latent else layers * expanded
    else:
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        values = 2 * (getattr(config, "num_key_value_heads", None) or heads) * width * layers
    return 2 * values * context


def cache_quotas(
    settings: Settings, experts: int, layer_bytes: Sequence[int], free_bytes: int | None
) -> list[int]:
    """Cached experts per MoE layer.

    An explicit `cache_ratio` or `cache_bytes` is met or refused; without one the cache takes what
    is free.

    Args:
        experts: routed experts per layer.
        layer_bytes: bytes of one expert, for each MoE layer; slots are as large as the largest.
        free_bytes: accelerator memory that experts may take, `None` where it is not limited
            (emulated).

    Raises:
        BudgetError: the explicit budget does not fit, or not even the staging slots do.
    """
    layers, slot_bytes = len(layer_bytes), max(layer_bytes)
    most = layers * experts
    if settings.cache_ratio is not None:
        wanted = round(settings.cache_ratio * experts) * layers
    elif settings.cache_bytes is not None:
        slots = settings.cache_bytes // slot_bytes
        wanted = min(most, slots - staging_slots(slots))
        if wanted < 0:
            raise BudgetError(
                f"cache_bytes {human(settings.cache_bytes)} is less than the {STAGING_SLOTS} "
                f"staging slots of "
                f"{human(slot_bytes)} that every run needs"
            )
    elif free_bytes is None:
        wanted = round(DEFAULT_EMULATED_RATIO * experts) * layers
    else:
        slots = int(free_bytes * (1 - RESERVE)) // slot_bytes
        wanted = min(most, slots - staging_slots(slots))
    staging = staging_slots(max(wanted, 0))
    needed = (max(wanted, 0) + staging) * slot_bytes
    if wanted < 0 or (free_bytes is not None and needed > free_bytes):
        raise BudgetError(
            f"{max(wanted, 0)} cached experts and {staging} staging slots of {human(slot_bytes)} "
            f"need "
            f"{human(needed)}, {human(free_bytes or 0)} are free: ask for a smaller cache_ratio "
            f"or cache_bytes"
        )
    return [wanted // layers + (1 if layer < wanted % layers else 0) for layer in range(layers)]


def check_host(needed_bytes: int, what: str, free_bytes: int | None = None) -> None:
    """Refuse before loading what the host cannot hold.

    Raises:
        BudgetError: with the numbers.
    """
    free = free_host_bytes() if free_bytes is None else free_bytes
    if needed_bytes > free:
        raise BudgetError(f"{what} need {human(needed_bytes)} of memory, {human(free)} are free")
