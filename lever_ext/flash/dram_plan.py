"""What of a target stays in DRAM: decided before anything is read.

A plan for a target of 6 layers of 100 MiB, embedding and head of 60 MiB together, budget 520 MiB:

    60   embedding, norm, head           always resident
    300  ring of 3 buffers               layers 1 to 5 pass through: one is computed, one is
                                         complete, one arrives
    ---
    160 left  ->  first layers that fit:  layer 0 (100), 60 left

    layer   0          1   2   3   4   5
            resident   streamed, in order, again and again

With routed experts, what is left after the layers is spent on experts: buffers that one layer's
experts pass through (staging), buffers for experts that are read ahead (prefetch), and as many
cached experts for each MoE layer as fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrimoe_plugin.errors import BudgetError
from hybrimoe_plugin.files import human
from lever_ext.flash.format import align
from lever_ext.flash.pack import FlashPack, block_memory

STAGING = 4
"""Buffers for experts that the cache does not admit: one is computed while others arrive."""
LEAST_STAGING = 2
PREFETCH = 8
"""Buffers for experts of the next layer, read on its router's prediction."""
DRAFT_PREFETCH = 16
"""As many more, where memory is left over, for experts that are read while the draft works."""
RING = 3
"""Buffers for streamed layers: one is computed, one is complete, one arrives."""
LEAST_RING = 2


@dataclass(frozen=True)
class DramPlan:
    """How a DRAM budget is spent on weights."""

    layers: int
    """The first layers, which stay. Those on an accelerator, which cost no DRAM, are counted too.
    """
    ring: int
    """Buffers that the other layers pass through."""
    expert_slots: int
    """Routed experts cached for each MoE layer."""
    staging: int
    """Buffers for experts that are not cached."""
    prefetch: int
    """Buffers for experts that are read before their layer's router has chosen."""
    nbytes: int
    """All of it, with the parts that are always resident."""


def plan_dram(
    pack: FlashPack,
    budget: int | None,
    ring: int = RING,
    elsewhere: int = 0,
) -> DramPlan:
    """Spend a budget: always-resident parts and buffers first, then first layers, then experts.

    Args:
        pack: the target.
        budget: bytes; None for no limit.
        ring: buffers for streamed layers, at least 2.
        elsewhere: first layers that an accelerator keeps.

    Raises:
        BudgetError: below what one pass needs, with the number that would do.
    """
    layers = pack.blocks("layer")[elsewhere:]
    experts = pack.blocks("expert")
    layer_sizes = [align(block.nbytes) for block in layers]
    expert_bytes = block_memory(experts)
    fixed = sum(align(block.nbytes) for block in pack.blocks("resident"))
    staging = min(STAGING, len(experts))
    least_staging = min(LEAST_STAGING, staging)

    least_layers = min(LEAST_RING, len(layers)) * block_memory(layers)
    needed = fixed + least_layers + least_staging * expert_bytes
    whole = fixed + sum(layer_sizes) + len(experts) * expert_bytes
    limit = whole + (staging + PREFETCH) * expert_bytes if budget is None else budget
    if limit < needed:
        raise _too_small(pack, limit, needed)

    if limit - needed < (staging - least_staging) * expert_bytes:
        staging = least_staging
    left = limit - fixed - staging * expert_bytes
    resident, ring = _first_layers(layer_sizes, left, ring)
    streamed = layer_sizes[resident:]
    left -= sum(layer_sizes[:resident]) + ring * max(streamed, default=0)

    moe_layers = len({block.layer for block in experts})
    slots = prefetch = 0
    if moe_layers:
        slots, prefetch = _expert_buffers(left, expert_bytes, moe_layers, len(experts))
        left -= (slots * moe_layers + prefetch) * expert_bytes
    return DramPlan(
        layers=elsewhere + resident,
        ring=ring,
        expert_slots=slots,
        staging=staging,
        prefetch=prefetch,
        nbytes=limit - left,
    )


def _first_layers(sizes: list[int], left: int, ring: int) -> tuple[int, int]:
    """(how many first layers stay, ring buffers) within `left` bytes.

    Args:
        sizes: of all layers, in the order of execution.
        ring: buffers that are wanted.
    """
    if sum(sizes) <= left:
        return len(sizes), 0
    largest = max(sizes)
    ring = min(ring, left // largest, len(sizes))
    ring = max(LEAST_RING, ring)
    resident = 0
    left -= ring * largest
    while resident < len(sizes) - ring and sizes[resident] <= left:
        left -= sizes[resident]
        resident += 1
    return resident, ring


def _expert_buffers(
    left: int,
    expert_bytes: int,
    moe_layers: int,
    experts: int,
) -> tuple[int, int]:
    """(cached experts for each MoE layer, prefetch buffers) within `left` bytes.

    Args:
        expert_bytes: memory of one expert.
        moe_layers: layers with routed experts.
        experts: of all layers together.
    """
    per_layer = experts // moe_layers
    prefetch = min(PREFETCH, left // expert_bytes, per_layer)
    left -= prefetch * expert_bytes
    slots = min(left // (expert_bytes * moe_layers), per_layer)
    left -= slots * expert_bytes * moe_layers
    if slots < per_layer:
        prefetch += min(DRAFT_PREFETCH, left // expert_bytes)
    return slots, prefetch


def _too_small(pack: FlashPack, limit: int, needed: int) -> BudgetError:
    parts = "embedding, head and two layers"
    if pack.blocks("expert"):
        parts += " and the buffers of two experts"
    # Rounded up, so that the number can be given back.
    tenths = -(-needed * 10 >> 20)
    return BudgetError(
        f"dram_budget of {human(limit)} is too small for {pack.path.name}: {parts} need "
        f"{tenths / 10:.1f}MiB"
    )
