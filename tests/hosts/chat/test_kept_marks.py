"""Kept caches that cannot be cut, and conversations that come back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import MODEL_ARCH_NAMES
from interrupts import ended, operations
from loading import injected
from more_families import CHANGES
from one_thread import one_torch_thread
from talks import Talk, words

from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.families.registry import family_of
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf

__all__ = ["one_torch_thread"]  # a fixture of this module

PLENTY = 2**30
WHOLE: dict[str, dict[str, Any]] = {
    "gpt_oss": CHANGES["gpt_oss"],  # sliding windows
    "qwen3_next": CHANGES["qwen3_next"],  # linear attention
    "deepseek_v32": {"index_n_heads": 16},  # indexed attention
}


@pytest.fixture(scope="module", params=[*WHOLE, "qwen3_moe"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    if family_of(request.param).architectures[0] not in MODEL_ARCH_NAMES.values():
        pytest.skip("this gguf package does not know the architecture")
    path: Path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    export_gguf(shrunk_model(request.param, **WHOLE.get(request.param, {})), path)
    found = injected(path, cpu_backend="torch", accelerator="none")
    yield found
    found.hybrimoe.close()


@pytest.fixture
def talk(model: Any) -> Talk:
    return Talk(model, PLENTY)


def is_whole(model: Any) -> bool:
    return model.config.model_type in WHOLE


def test_every_turn_is_what_it_is_without(talk: Talk) -> None:
    first = talk.ask(words(20, 1))
    assert first == talk.anew(words(20, 1))
    second = first + words(5, 3)
    answer = talk.ask(second)
    assert answer == talk.anew(second)
    assert talk.kept.shared == len(first) - 1

    assert talk.ask(second) == answer  # /retry
    assert talk.kept.shared == (len(first) if is_whole(talk.model) else len(second)) - 1
    assert talk.ask(second, piece=3) == answer
    assert talk.ask(second, piece=3) == answer
    assert len(second) - 3 <= talk.kept.shared < len(second)  # the last piece alone

    third = answer + words(8, 4)
    assert talk.ask(third, piece=3) == talk.anew(third)
    assert talk.kept.shared == len(answer) - 1


def test_conversations_come_back(talk: Talk) -> None:
    one = talk.ask(words(20, 1))
    talk.kept.put_aside()  # /clear
    two = talk.ask(words(18, 2))
    assert talk.kept.shared == 0
    for number in range(2):
        for before in (one, two):  # /load
            longer = before + words(4, 5 + number)
            found = talk.ask(longer)
            assert found == talk.anew(longer)
            assert talk.kept.shared >= len(before) - 1
        one, two = talk.anew(one + words(4, 5 + number)), found
    talk.kept.drop()
    assert talk.kept.store.sequences == 0


def test_interrupts_at_any_point(talk: Talk) -> None:
    begun = talk.ask(words(8, 6))
    longer, other = begun + words(6, 7), begun[:5] + words(6, 8)
    right, rest = talk.anew(longer), talk.anew(other)
    count = operations(lambda: talk.ask(longer, piece=3))
    rng = random.Random(0)
    for _ in range(6):
        ended(lambda: talk.ask(longer, piece=3), rng.randrange(1, count), KeyboardInterrupt())
        assert talk.ask(longer, piece=3) == right
        ended(lambda: talk.ask(other), rng.randrange(1, count), KeyboardInterrupt())
        assert talk.ask(other) == rest


def test_interrupted_passes_cost_no_more_than_themselves(talk: Talk) -> None:
    first = talk.ask(words(20, 1))
    second = first + words(7, 2)
    talk.kept.arguments(second)
    done = []

    def stop(tokens: int) -> None:
        done.append(tokens)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.kept.compute(second, 3, stop)
    assert talk.ask(second) == talk.anew(second)
    assert talk.kept.shared == len(first) - 1 + 6
