"""An answer: exact counts, times, Ctrl-C, and the lines printed after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted_chat import Model, chat

from hybrimoe_plugin.cli.chat.answer import Stop, TimedStreamer
from hybrimoe_plugin.cli.chat.report import EngineReport
from hybrimoe_plugin.policy.counters import Counters


def test_answer_and_exact_counts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    chat(Model("Paris.")).answer("capital?")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Paris."
    assert lines[2] == "prompt eval count:    14 token(s)"
    assert lines[5] == "eval count:           7 token(s)"
    names = [
        f"{kind} {value}"
        for kind in ("prompt eval", "eval")
        for value in ("count", "duration", "rate")
    ]
    assert [line.split(":")[0] for line in lines[2:8]] == names


def test_times_are_taken_at_the_tokens() -> None:
    clock: Iterator[float] = iter([10.0, 12.0, 13.0, 15.0])
    streamer = TimedStreamer(None, lambda: next(clock))
    streamer.start(4)
    streamer.put(torch.tensor([[1, 2, 3, 4]]))
    for token in range(3):
        streamer.put(torch.tensor([token]))
    timing = streamer.timing
    assert (timing.prompt_seconds, timing.eval_seconds, timing.tokens, timing.ids) == (
        2.0,
        3.0,
        3,
        [0, 1, 2],
    )
    assert timing.lines()[2].endswith(" 2.00 tokens/s")
    assert timing.lines()[5].endswith(" 0.67 tokens/s")


def test_answer_of_one_token_has_no_rate() -> None:
    streamer = TimedStreamer(None)
    streamer.start(1)
    streamer.put(torch.tensor([[1]]))
    streamer.put(torch.tensor([1]))
    assert streamer.timing.lines()[5].endswith(" 0.00 tokens/s")


def test_interrupt_ends_the_answer_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("abcdef", "next")
    model.interrupt_after = 3
    before = signal.getsignal(signal.SIGINT)
    talk = chat(model)
    assert talk.answer("go") is False
    assert signal.getsignal(signal.SIGINT) is before
    model.interrupt_after = None
    assert talk.answer("on") is True
    assert model.prompts[1] == "<u>go<a>abc<u>on<a>"
    assert "eval count:           3 token(s)" in capsys.readouterr().out


def test_second_interrupt_does_not_wait() -> None:
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_of_the_prompt_does_not_wait_for_the_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A long prompt's pass has no token to wait for."""
    model = Model("next")
    finish, passes = model.generate, []

    def generate(ids: torch.Tensor, **rest: Any) -> None:
        passes.append("begun")
        rest["streamer"].put(ids)
        os.kill(os.getpid(), signal.SIGINT)
        passes.append("finished")

    model.generate = generate  # type: ignore[assignment, method-assign]
    talk = chat(model)
    with pytest.raises(KeyboardInterrupt):
        talk.answer("a long one")
    assert passes == ["begun"] and talk.messages == []
    model.generate = finish  # type: ignore[method-assign]
    talk.answer("on")
    # The text streamer takes the next prompt for a prompt, not for more of the answer that was
    # broken off.
    assert capsys.readouterr().out.splitlines()[:2] == ["", "next"]


def test_engine_line_counts_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = Model("a", "b")
    counters = Counters()
    model.hybrimoe = SimpleNamespace(stats=counters.snapshot, emulated=True)
    talk = chat(model, EngineReport(model))
    talk.answer("x")
    (
        counters.activations,
        counters.cache_hits,
        counters.experts_cpu,
        counters.experts_accelerator,
    ) = 8, 6, 3, 5
    counters.demand_loads, counters.prefetches, counters.prefetches_used = 1, 2, 1
    # Counted between two answers: loading and warm start belong to none.
    talk.answer("y")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("engine:")]
    assert (
        lines
        == [
            "engine: cache hits 0/0, experts on CPU 0 / accelerator 0 / transferred 0, "
            "prefetches used 0/0 [accelerator emulated]"
        ]
        * 2
    )


def test_engine_line_of_a_run() -> None:
    counters = Counters()
    report = EngineReport(
        SimpleNamespace(hybrimoe=SimpleNamespace(stats=counters.snapshot, emulated=False))
    )
    report()
    (
        counters.activations,
        counters.cache_hits,
        counters.experts_cpu,
        counters.experts_accelerator,
    ) = 8, 6, 3, 5
    counters.demand_loads, counters.fills, counters.prefetches, counters.prefetches_used = (
        1,
        1,
        2,
        1,
    )
    assert report() == (
        "engine: cache hits 6/8 (75.0%), experts on CPU 3 / accelerator 5 / transferred 4, "
        "prefetches used 1/2"
    )
