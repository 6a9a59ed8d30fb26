"""Answers of targets on flash that were interrupted or failed, at any point: the next ones are
those given alone.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from at_once import in_threads
from interrupts import ended, operations

from hybrimoe_plugin.errors import FlashError
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import low_bit_copy
from lever_ext.placement.split import Place
from lever_ext.speculation.draft_ahead import OverlappedDrafting
from lever_ext.target import FlashTarget, load_target
from lever_ext.tree.policies import make_policy
from tests.lever.helpers import a_gate, least_budget, prompt

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("HYBRIMOE_LONG", 6))
"""Interrupts for each kind of target and way of decoding."""
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 5}
PLACES = (Place.STAYS, Place.COPIED, Place.CPU, Place.COPIED)
KINDS = (
    "llama, split",
    "qwen3_moe",
    *(("llama", "mixtral, split") if "HYBRIMOE_LONG" in os.environ else ()),
)
WAYS = ("plain", "by speculation")


class Case(NamedTuple):
    target: FlashTarget
    decoder: LeverDecoding
    alone: torch.Tensor

    def ask(self, way: str, seed: int = 0) -> torch.Tensor:
        more = {} if way == "plain" else {"custom_generate": self.decoder}
        found: torch.Tensor = self.target.model.generate(prompt(seed), **GREEDY, **more)
        return found

    def sound(self) -> bool:
        try:
            return all(torch.equal(self.ask(way), self.alone) for way in WAYS)
        except FlashError:
            return False


@pytest.fixture(scope="module", params=KINDS)
def case(
    request: pytest.FixtureRequest, plain_models: dict[str, Any], packs: dict[str, Path]
) -> Iterator[Case]:
    family, _, split = request.param.partition(", ")
    plain = plain_models[family]
    there: dict[str, Any] = (
        {"device": "emulated", "vram_budget": "1GiB", "places": PLACES} if split else {}
    )
    target = load_target(packs[family], dram_budget=least_budget(packs[family]), **there)
    target.set_gate(a_gate(plain))
    draft = LanguageModelDraft(low_bit_copy(plain, 3, 32) if family == "llama" else plain)
    decoder = LeverDecoding(draft, make_policy("fixed", 6), target, prune="always")
    decoder.draft_ahead = OverlappedDrafting(draft, least_wait=0.0, least_us=0.0)  # in every pass
    made = Case(target, decoder, plain.generate(prompt(0), **GREEDY))
    assert made.sound()
    yield made
    decoder.close()
    target.close()


@pytest.mark.parametrize("way", WAYS)
def test_the_next_answers_after_an_interrupt(case: Case, way: str) -> None:
    rng = random.Random(0)
    count = operations(lambda: case.ask(way, seed=1))
    reached = 0
    for _ in range(TIMES):
        place = rng.randint(1, count)
        reached += ended(lambda: case.ask(way, seed=1), place, KeyboardInterrupt())
        assert case.sound(), f"wrong after an interrupt at operation {place} of {count}"
    assert reached >= TIMES // 2, "most places lie before the end of the answer"


@pytest.mark.parametrize("way", WAYS)
def test_the_next_answers_after_a_read_that_failed(
    case: Case, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rng = os.preadv, random.Random(1)
    for _ in range(TIMES):
        calls, wrong, failed = itertools.count(1), rng.randint(1, 20), list[int]()

        def failing(*args: Any) -> int:
            if next(calls) == wrong:  # noqa: B023
                failed.append(wrong)  # noqa: B023
                raise OSError(5, "Input/output error")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing)
            for _ in range(20):
                case.ask(way, seed=1)  # what failed is read again
                if failed:
                    break
        assert failed, "the target reads too little for this test"
        assert case.sound(), f"wrong after read {wrong} failed"


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), MemoryError("no memory for the copy")]
)
def test_reads_that_go_on_failing_are_an_error_and_no_hang(
    error: Exception, packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load_target(packs["llama"], dram_budget=least_budget(packs["llama"]))

    def failing(*_: Any) -> int:
        raise error

    def ask() -> None:
        with pytest.raises(FlashError, match=f"cannot read the pack .*{error.args[-1]}"):
            target.model.generate(prompt(0), **GREEDY)

    target.model.generate(prompt(0), **GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        in_threads([ask], limit_s=60)
    target.close()
