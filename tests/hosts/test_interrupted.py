"""After an answer that was interrupted or failed, at any point, the next ones are right."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from interrupts import ended, operations

from hybrimoe_plugin import load_model
from hybrimoe_plugin.errors import BackendError

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("HYBRIMOE_LONG", 4))
"""Interrupts for each kind of model, and as many injected errors."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("mixtral", {"cpu_backend": "torch"}),
    "ggml": ("qwen3_moe", {"cpu_backend": "ggml"}),
    "operations": ("qwen3_moe", {"accelerator": "none"}),
    "operations, latent attention": ("deepseek_v3", {"accelerator": "none"}),
    "ggml, latent attention": ("deepseek_v3", {"cpu_backend": "ggml"}),
    "ggml, module by module": ("qwen2_moe", {"cpu_backend": "ggml", "graphs": "off"}),
    "kt": ("qwen3_moe", {"cpu_backend": "kt"}),
    "emulated, ggml": (
        "mixtral",
        {"accelerator": "emulated", "cpu_backend": "ggml", "cache_ratio": 0.4},
    ),
    "emulated, kt": (
        "qwen3_moe",
        {"accelerator": "emulated", "cpu_backend": "kt", "cache_ratio": 0.4},
    ),
    "emulated, torch": (
        "qwen3_moe",
        {"accelerator": "emulated", "cpu_backend": "torch", "cache": "lru"},
    ),
}
LONG = tiny.tokens(12, 1)
PROMPTS = [tiny.tokens(3, 0), LONG, tiny.tokens(1, 2)]


class Case(NamedTuple):
    model: Any
    alone: list[torch.Tensor]


def generate(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    found = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert isinstance(found, torch.Tensor)
    return found


@pytest.fixture(scope="module", params=sorted(KINDS))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    path = tmp_path_factory.mktemp("models") / "model.gguf"
    family, choices = KINDS[request.param]
    tiny.write_quantised(path, family)
    model, _ = load_model(None, path, progress=False, dtype="float32", **choices)
    alone = [generate(model, prompt) for prompt in PROMPTS]
    yield Case(model, alone)
    model.hybrimoe.close()


def sound(case: Case) -> None:
    for prompt, alone in zip(PROMPTS, case.alone, strict=True):
        assert torch.equal(generate(case.model, prompt), alone)
    case.model.hybrimoe.check_integrity()


def test_the_next_answer_after_an_interrupt(case: Case) -> None:
    rng = random.Random(0)
    answer = partial(generate, case.model, LONG)
    count = operations(answer)
    reached = 0
    for _ in range(TIMES):
        place = rng.randint(1, count)
        reached += ended(answer, place, KeyboardInterrupt())
        sound(case)
    assert reached > TIMES // 2, "most places lie before the end of the answer"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_next_answers_after_a_transfer_that_was_not_sent(
    case: Case, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = case.model.hybrimoe.engines[0].accelerator
    if accelerator is None:
        pytest.skip("nothing is sent")
    real = accelerator.onload
    for nth in (1, 2, 5, 9, 15):
        calls = itertools.count(1)

        def stopped(*args: Any, **named: Any) -> None:
            if next(calls) == nth:  # noqa: B023
                raise error
            real(*args, **named)

        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(accelerator, "onload", stopped)
            while True:  # until an answer needs so many
                generate(case.model, LONG)
        sound(case)


def test_the_next_answer_after_an_error_inside(case: Case) -> None:
    rng = random.Random(1)
    answer = partial(generate, case.model, LONG)
    count = operations(answer)
    kinds = (RuntimeError, MemoryError, OSError, BackendError)
    for time in range(TIMES):
        place = rng.randint(1, count)
        kind = kinds[time % len(kinds)]
        try:
            ended(answer, place, kind("injected"))
        except Exception as other:  # what our own code makes of it, or a library
            said = f"{other} {other.__context__}"
            assert "injected" in said, repr(other)
        sound(case)
