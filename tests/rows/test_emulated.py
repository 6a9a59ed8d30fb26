"""Calls of a few rows on an emulated accelerator give the plain forward's logits, whatever decides.

Every scheduler meets every cache, and every two values of other settings meet too. Each model runs
half of the row counts as batches, the others as trees, so every value meets every row count.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import few_rows
import pytest
import tiny
import torch
from loading import injected

from hybrimoe_plugin.config import BUDGETS, CACHES, PREFETCHERS, SCHEDULERS

RATIOS = (0.0, 0.25, 0.5)
"""Nothing is cached, a wave of staging slots at most, or half of what a layer may need."""
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 24, "num_experts_per_tok": 3},
    "qwen2_moe": {"num_experts": 24},
    "qwen3_moe": {"num_experts": 20, "num_experts_per_tok": 4},
    "deepseek_v2_lite": {"n_routed_experts": 24, "num_experts_per_tok": 4},
}
"""Changes to the tiny models: so many experts that a few rows do not need all."""
CASES = int(os.environ.get("HYBRIMOE_LONG", 3))
"""Of random settings."""

Wanted = dict[tuple[str, str, int], tuple[int, list[torch.Tensor]]]
"""(family, kind, rows) -> seed, and the plain forward's logits."""
RUN: dict[str, few_rows.Run] = {"batch": few_rows.conversations, "tree": few_rows.trees}


def settings(scheduler: int, cache: int) -> dict[str, Any]:
    """The other settings of a scheduler and a cache, by their numbers."""
    return {
        "family": list(FAMILIES)[(scheduler + cache) % len(FAMILIES)],
        "scheduler": SCHEDULERS[scheduler],
        "cache": CACHES[cache],
        "prefetch": PREFETCHERS[(scheduler + 2 * cache + cache // 2) % len(PREFETCHERS)],
        "budget": BUDGETS[(scheduler + cache // 3) % len(BUDGETS)],
        "cache_ratio": RATIOS[(scheduler + cache // 2) % len(RATIOS)],
    }


PAIRS = [settings(*pair) for pair in itertools.product(range(len(SCHEDULERS)), range(len(CACHES)))]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: tiny.write(tmp_path_factory.mktemp(family), family, changes=changes)
        for family, changes in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def wanted() -> Wanted:
    found: Wanted = {}
    for family, changes in FAMILIES.items():
        model = tiny.model(family, **changes)
        for (kind, run), rows in itertools.product(RUN.items(), few_rows.ROWS):
            found[family, kind, rows] = few_rows.decided(model, run, rows)
    return found


@pytest.fixture
def made(files: dict[str, Path]) -> Iterator[Any]:
    """Loads models, which are closed at the end."""
    models: list[Any] = []

    def load(family: str, **chosen: Any) -> Any:
        models.append(injected(files[family], accelerator="emulated", **chosen))
        return models[-1]

    yield load
    for model in models:
        model.hybrimoe.check_integrity()
        model.hybrimoe.close()


def test_every_two_values_meet() -> None:
    for one, other in itertools.combinations(PAIRS[0], 2):
        values = [{chosen[name] for chosen in PAIRS} for name in (one, other)]
        met = {(chosen[one], chosen[other]) for chosen in PAIRS}
        assert met == set(itertools.product(*values)), (one, other)


@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_logits_are_the_plain_forwards(number: int, made: Any, wanted: Wanted) -> None:
    chosen = dict(PAIRS[number])
    family = chosen.pop("family")
    model = made(family, **chosen)
    for place, rows in enumerate(few_rows.ROWS):
        kind = ("batch", "tree")[(number + place) % 2]
        seed, right = wanted[family, kind, rows]
        few_rows.check_same(RUN[kind](model, rows, seed), right)
    counts = model.hybrimoe.stats()
    assert counts.activations == counts.experts_cpu + counts.experts_accelerator > 0


@pytest.mark.parametrize("case", range(CASES))
def test_whatever_is_chosen_logits_are_the_plain_forwards(case: int, made: Any) -> None:
    """The same model runs batches and trees of any size in any order."""
    rng = random.Random(case)
    family = rng.choice(list(FAMILIES))
    model = made(
        family,
        scheduler=rng.choice(SCHEDULERS),
        cache=rng.choice(CACHES),
        prefetch=rng.choice(PREFETCHERS),
        budget=rng.choice(BUDGETS),
        cache_ratio=rng.choice((*RATIOS, rng.random(), 1.0)),
        look_ahead=rng.randint(1, 3),
        graphs=rng.choice(("auto", "off")),
    )
    plain = tiny.model(family, **FAMILIES[family])
    for turn in range(6):
        run, rows = rng.choice(list(RUN.values())), rng.randint(1, 40)
        seed, right = few_rows.decided(plain, run, rows, 1000 * case + 50 * turn)
        few_rows.check_same(run(model, rows, seed), right)
