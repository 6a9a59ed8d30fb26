"""The cells of `eval.lever`: what is run, in order."""

from __future__ import annotations

from collections.abc import Iterator

from eval.lever.cell import Cell
from eval.lever.identity_cell import IdentityCell
from eval.lever.lab import PROMPTS
from eval.lever.read_cell import ReadCell
from eval.lever.tree_cell import TreeCell
from eval.lever.trees import FEW_TREES, FEWEST_TREES, MOE_TREES


def _cells() -> Iterator[Cell]:
    yield ReadCell("read")
    for prompt in PROMPTS:
        yield TreeCell(f"dense, low-bit 65 %, {prompt}", prompt=prompt)
    yield IdentityCell("identity")
    for prompt in PROMPTS:
        yield TreeCell(f"moe, low-bit 65 %, {prompt}", "mixtral", prompt=prompt, trees=MOE_TREES)
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        yield TreeCell(f"dram {share:.0%}", trees=FEWEST_TREES, tokens=32, rounds=2, share=share)
    # n-grams are accepted seldom here: hardly more than a token a pass.
    for draft, tokens, rounds in (("low-bit 50 %", 32, 2), ("n-gram", 12, 1)):
        for prompt in PROMPTS:
            yield TreeCell(
                f"dense, {draft}, {prompt}",
                draft=draft,
                prompt=prompt,
                trees=FEW_TREES,
                tokens=tokens,
                rounds=rounds,
            )
    for throttle in ("ufs3.1", "ufs4.0", "nvme"):
        yield TreeCell(
            f"throttled {throttle}", trees=FEWEST_TREES, tokens=32, rounds=1, throttle=throttle
        )


CELLS = tuple(_cells())
QUICK_CELLS: tuple[Cell, ...] = (
    ReadCell("read", 4),
    IdentityCell("identity", 4, ("lever",)),
    TreeCell(
        "dense",
        trees=FEWEST_TREES,
        tokens=12,
        rounds=1,
    ),
    TreeCell(
        "moe",
        "mixtral",
        trees=("flash autoregressive", "chain 4", "opt_tree 8", "lever"),
        tokens=12,
        rounds=1,
    ),
)
