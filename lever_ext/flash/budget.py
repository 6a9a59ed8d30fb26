"""What of a target stays in DRAM: decided before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from hybrimoe_plugin.errors import BudgetError
from lever_ext.flash.format import align
from lever_ext.flash.pack import FlashPack, block_memory

STAGING = 4
"""Buffers for experts that the cache does not admit: one is computed while others arrive."""
AHEAD = 8
"""Buffers for experts of the next layer, read on its router's prediction."""
EARLY = 16
"""As many more, where memory is left over, for experts that are read while the draft works."""
RING = 3
"""Buffers for streamed layers: one is computed, one is complete, one arrives."""


@dataclass(frozen=True)
class Residency:
    """How a DRAM budget is spent on weights."""

    layers: int
    """The first layers, which stay; those on an accelerator, which cost no DRAM, are counted too.
    """
    ring: int
    """Buffers that the other layers pass through."""
    expert_slots: int
    """Routed experts cached for each MoE layer."""
    staging: int
    ahead: int
    """Buffers for experts that are read before their layer's router has chosen."""
    nbytes: int
    """All of it, with the parts that are always resident."""


def plan_residency(
    pack: FlashPack, budget: int | None, ring: int = RING, elsewhere: int = 0
) -> Residency:
    """Spend a budget: always-resident parts and buffers first, then first layers, then experts.

    Args:
        pack: the target.
        budget: bytes; None for no limit.
        ring: buffers for streamed layers, at least 2.
        elsewhere: first layers that an accelerator keeps.

    Raises:
        BudgetError: below what one pass needs, with the number that would do.
    """
    layers, experts = pack.blocks("layer")[elsewhere:], pack.blocks("expert")
    moe_layers = len({block.layer for block in experts})
    fixed = sum(align(block.nbytes) for block in pack.blocks("resident"))
    expert_bytes = block_memory(experts)
    staging = min(STAGING, len(experts))
    needed = fixed + min(2, len(layers)) * block_memory(layers) + min(2, staging) * expert_bytes
    sizes = [align(block.nbytes) for block in layers]
    whole = fixed + sum(sizes) + len(experts) * expert_bytes
    limit = whole + (staging + AHEAD) * expert_bytes if budget is None else budget
    if limit < needed:
        parts = "embedding, head and two layers" + (
            " and the buffers of two experts" if experts else ""
        )
        raise BudgetError(
            f"dram_budget of {limit >> 10} KiB is too small for {pack.path.name}: {parts} need "
            f"{-(-needed >> 10)} KiB"
        )
    if limit - needed < (staging - min(2, staging)) * expert_bytes:
        staging = min(2, staging)
    left = limit - fixed - staging * expert_bytes
    resident, ring = _first_layers(sizes, left, ring)
    left -= sum(sizes[:resident]) + ring * max(sizes[resident:], default=0)
    ahead = min(AHEAD, left // expert_bytes, len(experts) // moe_layers) if moe_layers else 0
    left -= ahead * expert_bytes
    slots = (
        min(left // (expert_bytes * moe_layers), len(experts) // moe_layers) if moe_layers else 0
    )
    left -= slots * expert_bytes * moe_layers
    if moe_layers and slots < len(experts) // moe_layers:
        early = min(EARLY, left // expert_bytes)
        ahead, left = ahead + early, left - early * expert_bytes
    used = limit - left
    return Residency(elsewhere + resident, ring, slots, staging, ahead, used)


def _first_layers(sizes: list[int], left: int, ring: int) -> tuple[int, int]:
    """(how many first layers stay, ring buffers) within `left` bytes."""
    if sum(sizes) <= left:
        return len(sizes), 0
    largest = max(sizes)
    ring = max(2, min(ring, left // largest, len(sizes)))
    resident = 0
    left -= ring * largest
    while resident < len(sizes) - ring and sizes[resident] <= left:
        left -= sizes[resident]
        resident += 1
    return resident, ring
