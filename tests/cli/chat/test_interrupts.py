"""Ctrl-C in a conversation: what it ends, what it leaves, and what it never tears."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from scripted_chat import Model, chat, session

from hybrimoe_plugin.cli.chat.interrupts import Interrupts
from hybrimoe_plugin.cli.chat.typed import loop


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_ends_the_answer_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("abcdef", "next")
    model.interrupt_after = 3
    before = signal.getsignal(signal.SIGINT)
    talk = chat(model)
    assert talk.answer("go") is False
    assert signal.getsignal(signal.SIGINT) is before
    model.interrupt_after = None
    assert talk.answer("on") is True
    assert model.prompts[1] == "<u>go<a>abc<u>on<a>"
    assert "eval count:           2 token(s)" in capsys.readouterr().err


def test_the_second_one_does_not_wait_and_keeps_what_was_said() -> None:
    model = Model("abc")

    def generate(ids: torch.Tensor, **rest: Any) -> None:
        rest["streamer"].put(ids)
        rest["streamer"].put(torch.tensor([ord("a")]))
        press()
        press()
        raise AssertionError("the second one was waited for")

    model.generate = generate  # type: ignore[method-assign]
    talk = chat(model)
    assert talk.answer("go") is False
    assert [each["content"] for each in talk.messages] == ["go", "a"]


def test_a_retry_that_it_ends_leaves_the_former_answer(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("a whole answer", "another")
    talk = chat(model)
    talk.answer("go")
    model.interrupt_after = 2
    assert talk.retry() is False
    assert [each["content"] for each in talk.messages] == ["go", "a whole answer"]
    assert "the former answer stays" in capsys.readouterr().err


def test_in_the_prompt_it_does_not_wait_for_the_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A long prompt's pass has no token to wait for."""
    model = Model("next")
    finish, passes = model.generate, []

    def generate(ids: torch.Tensor, **rest: Any) -> None:
        passes.append("begun")
        rest["streamer"].put(ids)
        press()
        passes.append("finished")

    model.generate = generate  # type: ignore[assignment, method-assign]
    talk = chat(model)
    with pytest.raises(KeyboardInterrupt):
        talk.answer("a long one")
    assert passes == ["begun"] and talk.messages == []
    model.generate = finish  # type: ignore[method-assign]
    talk.answer("on")
    assert capsys.readouterr().out == "next\n"


def test_elsewhere_it_does_nothing() -> None:
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    with interrupts.handled():
        press()
        with pytest.raises(KeyboardInterrupt), interrupts.raising():
            try:
                press()
            finally:
                press()  # what handles the first one is not torn
        with interrupts.answering(lambda: True):
            press()
        press()
        assert interrupts.requested
    assert signal.getsignal(signal.SIGINT) is before


def test_without_an_editor_it_leaves() -> None:
    def read(_prompt: str) -> str:
        press()
        raise AssertionError("went on reading")

    with pytest.raises(KeyboardInterrupt):
        loop.converse(session(Model()), read)
