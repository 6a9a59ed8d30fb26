"""Answers by a custom decoding method are the answers of the plain passes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from collected import Collected
from schedulers import OPTIONS, small_model

from hybrimoe_plugin.serve.batching.scheduler import Scheduler
from hybrimoe_plugin.serve.requests import Reason, Request, Sampling
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.ngram import NGramDraft
from lever_ext.tree.policies import make_policy


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(2)


@pytest.fixture(params=["plain", "speculated"])
def scheduler(model: Any, request: pytest.FixtureRequest) -> Any:
    decoder = None
    if request.param == "speculated":
        decoder = LeverDecoding(NGramDraft(), make_policy("lever"))
    made = Scheduler(model, decoder=decoder, **OPTIONS)
    assert made.together == (decoder is None)
    yield made
    made.close(10)


SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, logprobs=2, frequency_penalty=0.5),
    Sampling(temperature=0.9, top_p=0.9, seed=7),
    Sampling(temperature=0.9, seed=8, ignore_eos=True, repetition_penalty=1.1),
)
_seen: dict[int, list[int]] = {}


@pytest.mark.parametrize("number", range(len(SAMPLINGS)))
def test_any_sampling(scheduler: Any, number: int) -> None:
    prompt = tuple(tiny.tokens(6, seed=number)[0].tolist()) * 3
    sink = Collected()
    scheduler.submit(Request("a", prompt, 40, SAMPLINGS[number]), sink)
    assert sink.wait().reason in (Reason.STOP, Reason.LENGTH)
    assert sink.ids == _seen.setdefault(number, sink.ids)


def test_the_next_turn_begins_where_the_last_ended(scheduler: Any) -> None:
    prompt = tuple(tiny.tokens(30)[0].tolist())
    first, second = Collected(), Collected()
    scheduler.submit(Request("a", prompt, 8, Sampling(temperature=0.0, ignore_eos=True)), first)
    first.wait()
    scheduler.submit(Request("b", (*prompt, *first.ids, 5, 6), 4, SAMPLINGS[0]), second)
    second.wait()
    assert second.cached == 37


def test_it_stops_when_the_sink_has_enough(scheduler: Any) -> None:
    sink = Collected(stop=lambda ids: len(ids) == 3)
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    scheduler.submit(Request("a", (5, 6, 7) * 5, 200, sampling), sink)
    assert sink.wait() == (Reason.STOP, 3, None)
    assert scheduler.load().running == 0
