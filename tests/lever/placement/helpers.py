"""Placements that the tests share, and the DRAM for them."""

from __future__ import annotations

from pathlib import Path

from lever_ext.flash.dram_plan import plan_dram
from lever_ext.flash.pack import FlashPack, block_memory
from lever_ext.placement.split import Place

CPU, COPIED, STAYS = Place.CPU, Place.COPIED, Place.STAYS

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 10}

PLACES = (
    (STAYS, STAYS, STAYS, STAYS),
    (STAYS, STAYS, CPU, CPU),
    (STAYS, COPIED, CPU, COPIED),
    (COPIED, COPIED, COPIED, COPIED),
    (CPU, COPIED, CPU, COPIED),
    (CPU, CPU, COPIED, CPU),
)


def budget_for(path: Path, places: tuple[Place, ...], share: float) -> int:
    """Between the least that works and everything."""
    pack = FlashPack.open(path)
    whole = plan_dram(pack, None).nbytes
    layers, experts = pack.blocks("layer"), pack.blocks("expert")
    fixed = sum(block.nbytes for block in pack.blocks("resident"))
    least = fixed + 2 * block_memory(layers) + 4 * block_memory(experts)
    pack.close()
    return int(least + share * (whole - least))
