"""Tree policies by name: how far to draft and what to verify.

`lever` is ours; the others are its plain twins.
"""

from __future__ import annotations

from typing import Protocol

from hybrimoe_plugin.errors import ConfigError
from lever_ext.tree.fixed_trees import Chain, FixedBudget, NoSpeculation, OptTree, SpecInferTree
from lever_ext.tree.greedy import GainCostGreedy
from lever_ext.tree.growth import Growth
from lever_ext.tree.lever import Lever
from lever_ext.tree.token_tree import TokenTree

__all__ = [
    "POLICIES",
    "Chain",
    "FixedBudget",
    "GainCostGreedy",
    "Lever",
    "NoSpeculation",
    "OptTree",
    "SpecInferTree",
    "TreePolicy",
    "make_policy",
]

POLICIES = ("lever", "greedy", "opt_tree", "specinfer", "fixed", "chain", "none")


class TreePolicy(Protocol):
    """Builds the token tree of a cycle."""

    @property
    def name(self) -> str:
        """As `make_policy` knows it."""
        ...

    def build(self, growth: Growth) -> TokenTree:
        """Draft as far as the policy wants and choose. Mutates: the growth."""
        ...


def make_policy(name: str, size: int | None = None) -> TreePolicy:
    """The tree policy of that name.

    Args:
        name: one of `POLICIES`.
        size: chain length or node budget of those that have one.

    Raises:
        ConfigError: unknown name, or a size below 1.
    """
    if size is not None and size < 1:
        raise ConfigError(f"tree size: expected at least 1, found {size}")
    if name not in POLICIES:
        raise ConfigError(f"tree: expected one of {', '.join(POLICIES)}, found {name!r}")
    sized: dict[str, type[Chain] | type[FixedBudget] | type[OptTree]] = {
        "chain": Chain,
        "fixed": FixedBudget,
        "opt_tree": OptTree,
    }
    if name in sized:
        return sized[name]() if size is None else sized[name](size)
    plain: dict[str, TreePolicy] = {
        "lever": Lever(),
        "greedy": GainCostGreedy(),
        "specinfer": SpecInferTree(),
        "none": NoSpeculation(),
    }
    return plain[name]
