"""The optimal plan by brute force."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

from hybrimoe_plugin.core import LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule.machine_model import assemble

MAX_EXPERTS = 16
"""That is 65536 sets."""


def exact_plan(routed: Sequence[Routed], costs: CostModel, link_free_us: float = 0.0) -> LayerPlan:
    """The optimum in the machine model: the oracle of the tests and of `eval.schedule`.

    Raises:
        ValueError: more than 16 experts.
    """
    if len(routed) > MAX_EXPERTS:
        raise ValueError(
            f"exact_plan tries every set: at most {MAX_EXPERTS} experts, not {len(routed)}"
        )
    ids = [item.expert for item in routed]
    sets = chain.from_iterable(combinations(ids, count) for count in range(len(ids) + 1))
    plans = (assemble(routed, chosen, costs, link_free_us) for chosen in sets)
    return min(plans, key=lambda plan: plan.makespan_us)
