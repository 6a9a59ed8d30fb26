"""Whether an early exit pays: measured by judging it without using it, decided by the cost
model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import low_bit_copy
from lever_ext.early_exit.gate import ExitGate
from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings
from lever_ext.early_exit.rates import (
    EVERY,
    KEPT,
    LEAST,
    LOST,
    ExitRates,
    is_worthwhile,
    lost_share,
)
from lever_ext.target import load_target
from lever_ext.tree.cost import CycleCost
from lever_ext.tree.policies import FixedBudget
from lever_ext.tree.token_tree import TokenTree
from tests.lever.helpers import prompt

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 30}


def test_what_a_dropped_row_costs() -> None:
    assert lost_share([0, 2, 5], None) == 0.0
    assert lost_share([0, 2, 5], [0, 2, 5, 7]) == 0.0
    assert lost_share([0, 2, 5], [0, 2]) == pytest.approx(1 / 3)
    assert lost_share([0, 2, 5], [0, 5]) == pytest.approx(2 / 3)  # nobody comes past a dropped row


def test_rates_are_measured_before_and_again_while_the_exit_is_used() -> None:
    rates = ExitRates()
    assert (rates.kept, rates.lost) == (KEPT, LOST) and rates.due
    for _ in range(LEAST):
        assert rates.due
        rates.observe(0.9, 0.4)
    assert not rates.due and rates.kept > 0.8 and rates.lost > 0.3
    for _ in range(EVERY - 1):
        assert not rates.due
        rates.observe(0.2, None)
    assert rates.due and rates.kept < 0.4 and rates.lost > 0.3
    rates.observe(0.2, 0.0)
    assert not rates.due


@pytest.mark.parametrize(
    ("per_row", "lost", "want"), [(0.0, 0.01, False), (1e3, 0.01, True), (1e3, 0.5, False)]
)
def test_fewer_rows_must_save_more_than_lost_tokens_cost(
    per_row: float, lost: float, want: bool
) -> None:
    tree = TokenTree(tuple(range(10)), (-1, *([0] * 9)), (1.0,) * 10, tuple(range(10)))
    cost = CycleCost(lambda rows, leaves: 1e4 + per_row * rows)
    assert is_worthwhile(tree, cost, ExitRates(0.5, lost), 0.5) == want
    assert not is_worthwhile(tree, cost, ExitRates(0.5, lost), 0.0)


def test_reads_of_experts_count_as_saved() -> None:
    class Union:
        def prefixes(self, drafted: Any) -> torch.Tensor:
            return torch.arange(1.0, len(drafted) + 1).numpy() * 1e3

    tree = TokenTree(tuple(range(10)), (-1, *([0] * 9)), (1.0,) * 10, tuple(range(10)))
    flat = CycleCost(lambda rows, leaves: 1e4)
    assert not is_worthwhile(tree, flat, ExitRates(0.5, 0.01), 0.5)
    flat.union = Union()  # type: ignore[assignment]
    assert is_worthwhile(tree, flat, ExitRates(0.5, 0.01), 0.5)


def test_a_judged_exit_drops_nothing_and_a_used_one_must_have_been_judged(
    plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    plain = plain_models["llama"]
    target = load_target(packs["llama"])
    predictor = ExitPredictor(plain.get_output_embeddings().weight.detach(), 2, 0.0, "")
    want = plain.generate(prompt(2), **GREEDY)
    seen = {}
    for per_row in (0.0, 1e6):
        gate = ExitGate(predictor, PruneSettings(threshold=0.15, least_nodes=1))
        target.set_gate(gate)
        decoder = LeverDecoding(
            LanguageModelDraft(low_bit_copy(plain, 3, 32)), FixedBudget(12), target
        )
        decoder.cost.verify = lambda rows, leaves, per_row=per_row: 1e6 + per_row * rows
        assert torch.equal(
            target.model.generate(prompt(2), custom_generate=decoder, **GREEDY), want
        )
        seen[per_row] = [cycle.kept < cycle.nodes for cycle in decoder.stats.cycles]
        assert gate.rates.judged >= LEAST and gate.rates.kept != KEPT
        decoder.close()
    assert not any(seen[0.0]) and not any(seen[1e6][:LEAST])
    assert len(seen[1e6]) > LEAST and any(seen[1e6][LEAST:])
    target.close()
