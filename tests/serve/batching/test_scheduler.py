"""Answers that are computed together are the answers alone; none is lost, none waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from collected import Collected
from schedulers import OPTIONS, injected, prompt, small_model

from hybrimoe_plugin.errors import BudgetError
from hybrimoe_plugin.serve.batching.delivery import WORTH_WAITING
from hybrimoe_plugin.serve.batching.scheduler import Scheduler
from hybrimoe_plugin.serve.requests import (
    ClosingError,
    PromptError,
    QueueFullError,
    Reason,
    Request,
    Sampling,
)

GREEDY = Sampling(temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=["plain", "injected"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Prompts share passes with each other and with answers in the injected one only."""
    if request.param == "plain":
        return small_model()
    return injected(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(model: Any) -> Iterator[Any]:
    made = []

    def scheduler(**changes: Any) -> Scheduler:
        made.append(Scheduler(model, **{**OPTIONS, **changes}))
        return made[-1]

    yield scheduler
    for each in made:
        each.close(0)


def request(name: str, ids: tuple[int, ...], count: int, sampling: Sampling = GREEDY) -> Request:
    return Request(name, ids, count, sampling)


def alone(model: Any, ids: tuple[int, ...], count: int) -> list[int]:
    given = torch.tensor([ids])
    out = model.generate(given, max_new_tokens=count, do_sample=False)
    return out[0, len(ids) :].tolist()


def check_together(
    model: Any, scheduler: Scheduler, prompts: Sequence[tuple[int, ...]], counts: Sequence[int]
) -> list[Collected]:
    """Submit all prompts at once; each answer has so many tokens, and is the one alone."""
    sinks = [Collected() for _ in prompts]
    for number, (ids, count) in enumerate(zip(prompts, counts, strict=True)):
        scheduler.submit(request(str(number), ids, count), sinks[number])
    for ids, count, sink in zip(prompts, counts, sinks, strict=True):
        assert sink.wait() == (Reason.LENGTH, count, None)
        assert sink.ids == alone(model, ids, count)
    return sinks


def test_answers_together_are_the_answers_alone(model: Any, make: Any) -> None:
    prompts = [prompt(length, length) for length in (3, 40, 1, 25, 17, 60, 8)]
    check_together(model, make(), prompts, range(10, 17))


def test_the_next_turn_computes_only_what_is_new(model: Any, make: Any) -> None:
    scheduler = make()
    first = Collected()
    scheduler.submit(request("first", prompt(30), 6), first)
    first.wait()
    ids = (*prompt(30), *first.ids, *prompt(4, seed=9))
    second = Collected()
    scheduler.submit(request("second", ids, 6), second)
    second.wait()
    assert second.cached == 35  # the answer's last token was never computed
    assert second.ids == alone(model, ids, 6)


def test_equal_beginnings_are_computed_once(model: Any, make: Any) -> None:
    scheduler = make()
    ids = [(*prompt(40), token) for token in (5, 6, 7)]
    sinks = [Collected() for _ in ids]
    begun = threading.Event()
    long = Collected(stop=lambda _: bool(begun.set()))
    scheduler.submit(request("long", (*prompt(40), 4), 40), long)
    assert begun.wait(60)
    for one, sink in zip(ids, sinks, strict=True):
        scheduler.submit(request(str(one[-1]), one, 5), sink)
    for one, sink in zip(ids, sinks, strict=True):
        sink.wait()
        assert sink.cached == 40
        assert sink.ids == alone(model, one, 5)


def test_prompts_that_begin_alike_at_once_are_computed_once(model: Any, make: Any) -> None:
    shared = prompt(100)
    ids = [(*shared, *prompt(length, length)) for length in (0, 0, 9, 30)]
    sinks = check_together(model, make(), ids, [8] * 4)
    assert sinks[0].cached == 0
    assert all(sink.cached > 100 - WORTH_WAITING for sink in sinks[1:])


def test_a_sink_ends_its_answer(make: Any) -> None:
    sink = Collected(stop=lambda ids: len(ids) == 3)
    make().submit(request("a", prompt(5), 50), sink)
    assert sink.wait() == (Reason.STOP, 3, None)


def test_a_token_that_ends_the_text_is_not_told(model: Any, make: Any) -> None:
    scheduler = make()
    right = alone(model, prompt(12), 8)
    end = right[4]
    sampling = Sampling(temperature=0.0, stop_token_ids=(end,), ignore_eos=True)
    sink = Collected()
    scheduler.submit(request("a", prompt(12), 8, sampling), sink)
    assert sink.wait().reason is Reason.STOP
    assert sink.ids == right[: right.index(end)]


def test_cancelled_answers_give_their_place_up(make: Any) -> None:
    scheduler = make(batch=1)
    begun = threading.Event()
    first = Collected(stop=lambda _: bool(begun.set()))
    ticket = scheduler.submit(request("first", prompt(5), 200), first)
    waiting = Collected()
    second = scheduler.submit(request("waiting", prompt(6), 200), waiting)
    third = Collected()
    scheduler.submit(request("third", prompt(7), 2), third)
    assert begun.wait(60)
    second.cancel()
    ticket.cancel()
    ticket.cancel()
    assert first.wait().reason is Reason.CANCELLED
    assert waiting.wait() == (Reason.CANCELLED, 0, None)
    assert third.wait().reason is Reason.LENGTH
    load = scheduler.load()
    assert (load.running, load.waiting, load.kv_bytes) == (0, 0, 0)


def test_a_full_queue_refuses(make: Any) -> None:
    scheduler = make(batch=1, queue=1)
    begun = threading.Event()
    running = Collected(stop=lambda _: bool(begun.set()))
    ticket = scheduler.submit(request("a", prompt(5), 200), running)
    assert begun.wait(60)
    scheduler.submit(request("b", prompt(5), 1), Collected())
    with pytest.raises(QueueFullError):
        scheduler.submit(request("c", prompt(5), 1), Collected())
    ticket.cancel()


@pytest.mark.parametrize("ids", [(), (-1,), (96_000,), tuple(range(256))])
def test_prompts_that_cannot_be_answered_are_refused(make: Any, ids: tuple[int, ...]) -> None:
    with pytest.raises(PromptError):
        make().submit(request("a", ids, 1), Collected())


def test_memory_for_no_prompt_is_refused_at_the_start(make: Any) -> None:
    with pytest.raises(BudgetError, match="leave no room"):
        make(kv_bytes=1000)


def test_an_answer_ends_where_the_context_does(make: Any) -> None:
    sink = Collected()
    make().submit(Request("a", prompt(250), None, GREEDY), sink)
    assert sink.wait() == (Reason.LENGTH, 6, None)


def test_where_memory_runs_out_the_last_waits_and_goes_on(model: Any, make: Any) -> None:
    probe = make()
    per_token = probe._memory.per_token
    scheduler = make(kv_bytes=per_token * 3 * (256 + 25), prefix_bytes=0)
    prompts = [prompt(20, seed) for seed in range(4)]
    check_together(model, scheduler, prompts, [30] * 4)


def test_closing_finishes_what_runs_and_refuses_what_waits(make: Any) -> None:
    scheduler = make(batch=1)
    begun = threading.Event()
    running = Collected(stop=lambda _: bool(begun.set()))
    scheduler.submit(request("a", prompt(5), 20), running)
    assert begun.wait(60)
    waiting = Collected()
    scheduler.submit(request("b", prompt(5), 20), waiting)
    scheduler.close(60)
    assert running.wait() == (Reason.LENGTH, 20, None)
    assert isinstance(waiting.wait().error, ClosingError)
    with pytest.raises(ClosingError):
        scheduler.submit(request("c", prompt(5), 1), Collected())


def test_closing_does_not_wait_longer_than_it_may(make: Any) -> None:
    scheduler = make()
    begun = threading.Event()
    sink = Collected(stop=lambda _: bool(begun.set()))
    scheduler.submit(request("a", prompt(5), 240), sink)
    assert begun.wait(60)
    scheduler.close(0)
    assert sink.wait().reason in (Reason.CANCELLED, Reason.LENGTH)


class Broken(Collected):
    def put(self, token: Any) -> bool:
        raise OSError("gone")


def test_a_sink_that_raises_harms_no_other(model: Any, make: Any) -> None:
    scheduler = make()
    broken, fine = Broken(), Collected()
    scheduler.submit(request("a", prompt(5), 20), broken)
    scheduler.submit(request("b", prompt(9), 20), fine)
    assert broken.wait().reason is Reason.FAILED
    fine.wait()
    assert fine.ids == alone(model, prompt(9), 20)
    assert scheduler.failed is None


def test_a_pass_that_fails_once_costs_only_time(
    model: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make()
    plain, failures = model.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        if kwargs["input_ids"].shape[0] == 2 and not failures:
            failures.append(1)
            raise RuntimeError("a kernel failed, behind the new entries")
        return out

    monkeypatch.setattr(model, "forward", forward)
    sinks = [Collected(), Collected()]
    for seed, sink in enumerate(sinks):
        scheduler.submit(request(str(seed), prompt(9, seed), 20), sink)
    for seed, sink in enumerate(sinks):
        assert sink.wait().reason is Reason.LENGTH
        assert sink.ids == alone(model, prompt(9, seed), 20)


def test_passes_that_keep_failing_end_their_answers_alone(
    model: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make()

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", forward)
        sink = Collected()
        scheduler.submit(request("a", prompt(9), 20), sink)
        assert "broken" in str(sink.wait().error)
    again = Collected()
    scheduler.submit(request("b", prompt(9), 20), again)
    assert again.wait().reason is Reason.LENGTH


def test_a_prompt_that_makes_passes_fail_ends_no_other_answer(
    model: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make()
    plain = model.forward
    expected = alone(model, prompt(9), 60)
    bad = next(token for token in range(5, 96) if token not in (*prompt(9), *expected))

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        if bad in kwargs["input_ids"]:
            raise RuntimeError("no such token, behind the new entries")
        return out

    begun = threading.Event()
    long = Collected(stop=lambda _: bool(begun.set()))
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", forward)
        scheduler.submit(request("long", prompt(9), 60), long)
        assert begun.wait(60)
        for number in range(3):
            sink = Collected()
            scheduler.submit(request(f"bad {number}", (3, bad, 4), 5), sink)
            assert "no such token" in str(sink.wait().error)
        assert long.wait().reason is Reason.LENGTH
    assert long.ids == expected
