"""Threads that share a model: each gets the text that it gets alone, with every backend."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from at_once import LONG_S, in_threads
from threaded import ANSWERS, KINDS, THREADS, Case, Question, load, questions

from hybrimoe_plugin.compute.cpu.kt_experts import KTExperts
from hybrimoe_plugin.errors import BackendError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=sorted(KINDS))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    with pytest.MonkeyPatch.context() as patch:
        model = load(request.param, tmp_path_factory.mktemp("model"), patch)
        _, choices = KINDS[request.param]
        asked = questions(model, decided="accelerator" not in choices)
        alone = [question.ask(model) for question in asked]
        yield Case(model, asked, alone)
        model.hybrimoe.close()


def test_each_thread_gets_what_it_gets_alone(case: Case) -> None:
    def answer(question: Question) -> list[int] | str:
        try:
            return question.ask(case.model)
        except Exception as error:
            return repr(error)

    def answers(question: Question) -> list[list[int] | str]:
        return [answer(question) for _ in range(ANSWERS)]

    found = in_threads([partial(answers, question) for question in case.questions])
    wrong = 0
    for given, alone in zip(found, case.alone, strict=True):
        wrong += sum(answer != alone for answer in given)
    assert not wrong, f"{wrong} of {THREADS * ANSWERS} answers are wrong"
    handle = case.model.hybrimoe
    handle.check_integrity()
    if len(handle.engines) > 1:
        first, second = (engine.cpu for engine in handle.engines)
        assert getattr(first, "backend", first) is getattr(second, "backend", second)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        made = load("ggml", tmp_path_factory.mktemp("model"), patch)
        yield made
        made.hybrimoe.close()


def test_answers_interleave_step_by_step(model: Any) -> None:
    order: list[int] = []

    def note(*_: object) -> None:
        order.append(threading.get_ident())

    def ask(seed: int) -> None:
        question = Question(tiny.tokens(4, seed))
        for _ in range(4):
            question.ask(model)

    hook = model.model.register_forward_pre_hook(note)
    in_threads([partial(ask, 0), partial(ask, 1)])
    hook.remove()
    first, last = {}, {}
    for place, thread in enumerate(order):
        first.setdefault(thread, place)
        last[thread] = place
    assert max(first.values()) < min(last.values()), (
        "the second thread begins before the first one ends"
    )


def test_parts_that_are_called_from_outside_wait_for_their_turn(model: Any) -> None:
    ids = tiny.tokens(1)
    question = Question(tiny.tokens(9, 1))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, 64, generator=generator)
    head = model.get_output_embeddings()
    embed = model.get_input_embeddings()

    def whole() -> Any:
        return model.model(ids, use_cache=False).last_hidden_state

    def answer() -> Any:
        return torch.tensor(question.ask(model))

    calls: list[tuple[Callable[[], Any], int]] = [
        (whole, 60),
        (partial(head, hidden), 60),
        (partial(embed, ids), 60),
        (answer, 3),
    ]
    with torch.no_grad():
        alone = [call() for call, _ in calls]

    @torch.no_grad()
    def often(call: Callable[[], Any], times: int) -> list[Any]:
        return [call() for _ in range(times)]

    given = in_threads([partial(often, call, times) for call, times in calls])
    for found, wanted in zip(given, alone, strict=True):
        for value in found:
            torch.testing.assert_close(value, wanted, rtol=0, atol=0)


def test_an_interrupt_in_one_thread_leaves_the_model_to_the_others(model: Any) -> None:
    ids = tiny.tokens(5)
    ask = partial(Question(tiny.tokens(9, 3)).ask, model)
    alone = ask()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        whole = model.model(ids).last_hidden_state
        hook = model.model.norm.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            in_threads([ask])
        with pytest.raises(KeyboardInterrupt):
            ask()
        hook.remove()
        again = model.model(ids).last_hidden_state
    torch.testing.assert_close(again, whole)
    assert in_threads([ask, ask]) == [alone, alone]


class Stopped:
    """A model whose next pass stops in its middle, on a thread of its own, until it is let go."""

    def __init__(self, model: Any) -> None:
        self._go, inside = threading.Event(), threading.Event()

        def stop(*_: object) -> None:
            inside.set()
            assert self._go.wait(LONG_S)

        self._hook = model.model.norm.register_forward_pre_hook(stop)
        self._thread = threading.Thread(target=lambda: model(tiny.tokens(4)), daemon=True)
        self._thread.start()
        assert inside.wait(LONG_S)

    def go(self) -> None:
        self._hook.remove()
        self._go.set()
        self._thread.join(LONG_S)


def test_two_models_compute_at_the_same_time(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load("torch", tmp_path, monkeypatch)
    stopped = Stopped(other)
    question = Question(tiny.tokens(4))
    (answer,) = in_threads([partial(question.ask, model)])
    assert len(answer) == 10
    stopped.go()
    other.hybrimoe.close()


def test_closing_waits_for_the_running_pass_and_then_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("ggml", tmp_path, monkeypatch)
    stopped = Stopped(model)
    closing = threading.Thread(target=model.hybrimoe.close, daemon=True)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive(), "memory is given back under a thread that computes"
    stopped.go()
    closing.join(LONG_S)
    for call in (model, model.model):
        with pytest.raises(BackendError, match="was closed"):
            call(tiny.tokens(3))


def test_closing_a_timeline_while_others_compute(model: Any, tmp_path: Path) -> None:
    question = Question(tiny.tokens(5))

    def draw() -> None:
        for place in range(20):
            model.hybrimoe.timeline(tmp_path / f"{place}.json").close()
            assert model.hybrimoe.stats().calls >= 0
            model.hybrimoe.reset_stats()

    in_threads([draw, lambda: [question.ask(model) for _ in range(4)]])
    assert all(engine.timeline is None for engine in model.hybrimoe.engines), (
        "nothing is planned for a closed one"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked on this system")
def test_a_forked_process_is_told_that_its_threads_are_gone(model: Any) -> None:
    model(tiny.tokens(3))
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            model(tiny.tokens(3))
        except BackendError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    model(tiny.tokens(3))


def test_standard_output_survives_two_pools_made_at_once() -> None:
    """kt-kernel's greetings are kept from it meanwhile."""
    before = os.fstat(1)
    in_threads([lambda: [KTExperts(1).close() for _ in range(10)]] * 3)
    assert os.path.samestat(before, os.fstat(1))
