"""Answers that were interrupted or failed, at any point and with every backend: the next ones are
those given alone.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
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
PROMPTS = [tiny.tokens(count, seed) for seed, count in enumerate((3, 12, 1))]


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
    folder = tmp_path_factory.mktemp("models")
    family, choices = KINDS[request.param]
    tiny.write_quantised(folder / "model.gguf", family)
    model, _ = load_model(None, folder / "model.gguf", progress=False, dtype="float32", **choices)
    yield Case(model, [generate(model, prompt) for prompt in PROMPTS])
    model.hybrimoe.close()


def sound(case: Case) -> None:
    for prompt, alone in zip(PROMPTS, case.alone, strict=True):
        assert torch.equal(generate(case.model, prompt), alone)
    case.model.hybrimoe.check_integrity()


def test_the_next_answer_after_an_interrupt(case: Case) -> None:
    rng = random.Random(0)
    count = operations(lambda: generate(case.model, PROMPTS[1]))
    reached = 0
    for _ in range(TIMES):
        place = rng.randint(1, count)
        reached += ended(lambda: generate(case.model, PROMPTS[1]), place, KeyboardInterrupt())
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
                generate(case.model, PROMPTS[1])
        sound(case)


def test_the_next_answer_after_an_error_inside(case: Case) -> None:
    rng = random.Random(1)
    count = operations(lambda: generate(case.model, PROMPTS[1]))
    errors = (RuntimeError, MemoryError, OSError, BackendError)
    for time in range(TIMES):
        place, error = rng.randint(1, count), errors[time % len(errors)]("injected")
        try:
            ended(lambda: generate(case.model, PROMPTS[1]), place, error)
        except Exception as other:  # what our own code makes of it, or a library
            assert "injected" in str(other) or "injected" in str(other.__context__), repr(other)
        sound(case)
