"""The warm-up of a chat: it builds what steps need, and nothing else of it is left to see."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from one_thread import one_torch_thread

from hybrimoe_plugin import load_model
from hybrimoe_plugin.cli.chat.warm_up import warm_up
from hybrimoe_plugin.errors import BackendError

__all__ = ["one_torch_thread"]  # a fixture of this module


def load(folder: Path, **settings: Any) -> Any:
    return load_model(None, tiny.write(folder, "mixtral"), progress=False, **settings)[0]


def ended(thread: threading.Thread | None) -> None:
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()


def test_answers_and_counters_are_those_of_a_model_without_one(tmp_path: Path) -> None:
    model, other = load(tmp_path, accelerator="none"), load(tmp_path, accelerator="none")
    passes: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _model, _args, out: passes.append(out.logits))
    ended(warm_up(model))
    assert [logits.shape[1] for logits in passes] == [1, 1, 1]
    hook.remove()
    assert model.hybrimoe.stats() == other.hybrimoe.stats()
    prompt = tiny.tokens(5)
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, other(prompt).logits)
    assert model.hybrimoe.stats().calls == other.hybrimoe.stats().calls


def test_what_an_accelerator_remembers_is_left_alone(tmp_path: Path) -> None:
    model = load(tmp_path, accelerator="emulated", cache_ratio=0.5)
    assert warm_up(model) is None
    assert warm_up(SimpleNamespace()) is None


def test_an_error_is_left_to_the_first_answer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load(tmp_path, accelerator="none")
    model.hybrimoe.close()
    ended(warm_up(model))
    assert capfd.readouterr().err == ""
    with pytest.raises(BackendError, match="closed"):
        model(tiny.tokens(2))
