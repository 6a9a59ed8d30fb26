"""The tree policies that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable

from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.base import Draft
from lever_ext.target import FlashTarget
from lever_ext.tree.policies import (
    Chain,
    FixedBudget,
    Lever,
    NoSpeculation,
    OptTree,
    SpecInferTree,
    TreePolicy,
    make_policy,
)

TREES: dict[str, Callable[[], TreePolicy]] = {
    "flash autoregressive": NoSpeculation,
    "chain 8": lambda: Chain(8),
    "chain 4": lambda: Chain(4),
    "specinfer": SpecInferTree,
    "specinfer 4-2-2-1": lambda: SpecInferTree((4, 2, 2, 1, 1, 1)),
    "fixed 16": lambda: FixedBudget(16),
    "fixed 8": lambda: FixedBudget(8),
    "opt_tree 4": lambda: OptTree(4),
    "opt_tree 16": lambda: OptTree(16),
    "opt_tree 8": lambda: OptTree(8),
    "opt_tree 48": lambda: OptTree(48),
    "greedy": lambda: make_policy("greedy"),
    "lever": Lever,
    "lever, no overlap": Lever,
    "lever, cost without union": Lever,
}
DENSE_TREES = (
    "flash autoregressive",
    "chain 8",
    "specinfer",
    "specinfer 4-2-2-1",
    "fixed 16",
    "opt_tree 16",
    "opt_tree 48",
    "greedy",
    "lever, no overlap",
    "lever",
)
MOE_TREES = (
    "flash autoregressive",
    "chain 8",
    "chain 4",
    "specinfer",
    "fixed 8",
    "opt_tree 4",
    "opt_tree 8",
    "opt_tree 16",
    "greedy",
    "lever, cost without union",
    "lever, no overlap",
    "lever",
)
FEW_TREES = (
    "flash autoregressive",
    "chain 8",
    "specinfer",
    "fixed 16",
    "opt_tree 16",
    "lever",
)
FEWEST_TREES = ("flash autoregressive", "chain 8", "specinfer", "opt_tree 16", "lever")


def make_decoder(tree: str, target: FlashTarget, draft: Draft) -> LeverDecoding:
    """The decoding of a tree policy; only ours drafts ahead, the others are plain."""
    policy = TREES[tree]()
    speculates = policy.name != "none"
    overlap = policy.name == "lever" and "no overlap" not in tree
    return LeverDecoding(
        draft if speculates else None,
        policy,
        target,
        overlap=overlap,
        price_union="without union" not in tree,
    )
