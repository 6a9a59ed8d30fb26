"""Find the slots of routed experts in a table on the device: all of them, or none."""

# Triton's idiom: constants in capitals, arguments without Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def look_up(row, ids, slots, TOP_K: tl.constexpr, PLACES: tl.constexpr):
    """slots[TOP_K] of the experts ids[TOP_K] in row[E]; one program, PLACES a power of two."""
    place = tl.arange(0, PLACES)
    inside = place < TOP_K
    expert = tl.load(ids + place, inside, 0)
    slot = tl.load(row + expert, inside, 0)
    missing = tl.sum((slot < 0).to(tl.int32), axis=0)
    tl.store(slots + place, tl.where(missing > 0, -1, slot), inside)


def find_slots(row: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[1, K] int64 slots of one token's experts; -1 in all places if one is in none.

    One launch; torch's operations are five (`TorchKernels.find_slots`, the plain twin).

    Args:
        row: [E] int64, an expert's slot or -1; on the device.
        ids: [1, K] integer experts, beside it.
    """
    slots = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    top_k = ids.shape[1]
    look_up[(1,)](row, ids.contiguous(), slots, top_k, triton.next_power_of_2(top_k))
    return slots
