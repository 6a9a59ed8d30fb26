"""What goes wrong with one answer, or ends it, changes nothing for the others."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from collected import Collected
from more_families import CHANGES
from schedulers import OPTIONS, prompt, small_model

from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.serve.batching.scheduler import Scheduler
from hybrimoe_plugin.serve.requests import ClosingError, Reason, Request, Sampling
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.ngram import NGramDraft
from lever_ext.tree.policies import make_policy

GREEDY = Sampling(temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


class Gate:
    """Holds the scheduler's thread inside a sink, at the first token."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, _ids: list[int]) -> bool:
        self.reached.set()
        assert self.open.wait(60)
        return False


def test_an_answer_goes_on_as_before_when_a_prompt_beside_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shrunk_model("qwen3_next", **CHANGES["qwen3_next"])
    model.generation_config.eos_token_id = None
    plain, long = model.forward, tuple(token % 96 for token in prompt(50, 5))

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].tolist() == [list(long[32:48])]:
            raise RuntimeError("the third piece cannot be computed")
        return plain(*args, **kwargs)

    def answers(with_failure: bool) -> list[list[int]]:
        scheduler = Scheduler(model, **OPTIONS)
        gate = Gate()
        sinks = [Collected(gate), Collected(), Collected()]
        for seed, sink in enumerate(sinks[:2]):
            ids = tuple(token % 96 for token in prompt(9, seed))
            scheduler.submit(Request(str(seed), ids, 12, GREEDY), sink)
        assert gate.reached.wait(60)
        if with_failure:
            scheduler.submit(Request("long", long, 5, GREEDY), sinks[2])
        gate.open.set()
        for sink in sinks[:2]:
            sink.wait()
        if with_failure:
            assert sinks[2].wait().reason is Reason.FAILED
        scheduler.close(10)
        return [sink.ids for sink in sinks[:2]]

    monkeypatch.setattr(model, "forward", forward)
    assert answers(with_failure=True) == answers(with_failure=False)


def test_a_cache_behind_logits_that_are_no_numbers_is_not_kept(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(model, **OPTIONS)
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits * torch.nan
        return out

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", forward)
        broken = Collected()
        scheduler.submit(Request("a", prompt(9), 5, GREEDY), broken)
        assert broken.wait().reason is Reason.FAILED
    again = Collected()
    scheduler.submit(Request("b", prompt(9), 5, GREEDY), again)
    assert again.wait().reason is Reason.LENGTH
    assert again.cached == 0
    scheduler.close(10)


def test_closing_ends_those_that_were_sent_back_too(model: Any) -> None:
    probe = Scheduler(model, **OPTIONS)
    per_token = probe._memory.per_token
    probe.close(0)
    scheduler = Scheduler(model, **{**OPTIONS, "kv_bytes": per_token * 2 * (256 + 25)})
    sent_back = threading.Event()
    gate = Gate()

    def stop(ids: list[int]) -> bool:
        if scheduler.load().waiting:
            sent_back.set()
            return gate(ids)
        return False

    first, second = Collected(stop), Collected()
    scheduler.submit(Request("a", prompt(20), 200, GREEDY), first)
    scheduler.submit(Request("b", prompt(20, 1), 200, GREEDY), second)
    assert sent_back.wait(60)
    closing = threading.Thread(target=scheduler.close, args=(0.0,))
    closing.start()
    while not second_is_cancelled(scheduler):
        pass
    gate.open.set()
    closing.join(60)
    assert first.wait().reason is Reason.CANCELLED
    assert second.wait().reason is Reason.CANCELLED


def second_is_cancelled(scheduler: Scheduler) -> bool:
    return all(each.is_cancelled for each in scheduler._waiting)


def test_cancelling_all_that_waits_leaves_the_server_running(model: Any) -> None:
    scheduler = Scheduler(model, **OPTIONS)
    with scheduler._changed:  # the thread sees both at once
        sink = Collected()
        scheduler.submit(Request("a", prompt(5), 5, GREEDY), sink).cancel()
    assert sink.wait().reason is Reason.CANCELLED
    again = Collected()
    scheduler.submit(Request("b", prompt(5), 5, GREEDY), again)
    assert again.wait().reason is Reason.LENGTH
    scheduler.close(10)


def watch(running: Collected, waiting: Collected) -> list[bool]:
    """Of every further token of one answer: whether the other has ended by then."""
    found: list[bool] = []

    def stop(_ids: list[int]) -> bool:
        found.append(waiting.end_ is not None)
        return False

    running._stop = stop
    return found


class TestSpeculated:
    """A whole answer is computed at a time."""

    @pytest.fixture
    def scheduler(self, model: Any) -> Any:
        decoder = LeverDecoding(NGramDraft(), make_policy("lever"))
        made = Scheduler(model, decoder=decoder, **OPTIONS)
        yield made
        made.close(0)

    def test_one_that_waits_can_be_cancelled_meanwhile(self, scheduler: Scheduler) -> None:
        gate = Gate()
        running, waiting = Collected(gate), Collected()
        scheduler.submit(Request("a", prompt(5), 200, GREEDY), running)
        assert gate.reached.wait(60)
        scheduler.submit(Request("b", prompt(5), 5, GREEDY), waiting).cancel()
        ended_first = watch(running, waiting)
        gate.open.set()
        running.wait()
        assert waiting.wait().reason is Reason.CANCELLED
        assert ended_first[-1]

    def test_those_that_wait_are_refused_at_once_when_the_server_closes(
        self, scheduler: Scheduler
    ) -> None:
        gate = Gate()
        running, waiting = Collected(gate), Collected()
        scheduler.submit(Request("a", prompt(5), 200, GREEDY), running)
        assert gate.reached.wait(60)
        scheduler.submit(Request("b", prompt(5), 5, GREEDY), waiting)
        closing = threading.Thread(target=scheduler.close, args=(60.0,))
        closing.start()
        while not scheduler._closing:
            pass
        ended_first = watch(running, waiting)
        gate.open.set()
        assert running.wait().reason is Reason.LENGTH
        assert isinstance(waiting.wait().error, ClosingError)
        assert ended_first[-1]
        closing.join(60)
