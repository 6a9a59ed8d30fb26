"""A conversation whose KV cache is kept says what one says that computes every prompt anew."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from graphed import Loader
from interrupts import ended, operations
from one_thread import one_torch_thread
from replayed import Replayed
from talks import TOKENS, Talk, words

__all__ = ["one_torch_thread"]  # a fixture of this module

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu": ("qwen3_moe", {"cpu_backend": "torch"}),
    "latent attention": ("deepseek_v3", {"cpu_backend": "ggml"}),
    "graphs": ("mixtral", {}),
}


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    with pytest.MonkeyPatch.context() as patch:
        loads = Loader(tmp_path_factory.mktemp("models"), patch)
        yield loads
        loads.close()


@pytest.fixture(scope="module", params=sorted(KINDS))
def talk(request: pytest.FixtureRequest, loader: Loader) -> Talk:
    family, settings = KINDS[request.param]
    capture = Replayed() if request.param == "graphs" else None
    return Talk(loader(family, capture, **settings))


def test_every_turn_is_what_it_is_without(talk: Talk) -> None:
    talk.kept.drop()
    system, question = words(7, 1), words(9, 2)
    first = talk.ask(system + question)
    assert first == talk.anew(system + question)
    assert talk.kept.shared == 0

    second = first + words(5, 3)
    answer = talk.ask(second)
    assert answer == talk.anew(second)
    # The answer's last token was never computed.
    assert talk.kept.shared == len(first) - 1

    again = talk.ask(second)  # /retry
    assert again == answer
    assert talk.kept.shared == len(second) - 1

    turned = [*system[:-1], (system[-1] + 1) % 64, *second[len(system) :]]  # another system prompt
    assert talk.ask(turned) == talk.anew(turned)
    assert talk.kept.shared == len(system) - 1

    dropped = system + second[len(first) :]  # without the oldest turn
    assert talk.ask(dropped) == talk.anew(dropped)

    talk.kept.drop()  # /clear
    assert talk.ask(dropped) == talk.anew(dropped)
    assert talk.kept.shared == 0


def test_conversations_come_back_from_the_store(talk: Talk) -> None:
    stored = Talk(talk.model, 2**30)
    one, two = stored.ask(words(20, 1)), stored.ask(words(18, 2))
    for number in range(3):  # so often that graphs are replayed
        one = check_longer(stored, one, 3 + number)
        two = check_longer(stored, two, 6 + number)
    assert stored.kept.store.hits == 6


def check_longer(talk: Talk, before: list[int], seed: int) -> list[int]:
    prompt = before + words(4, seed)
    found = talk.ask(prompt)
    assert found == talk.anew(prompt)
    assert talk.kept.shared == len(before) - 1
    return found


def test_prompts_in_pieces(talk: Talk) -> None:
    talk.kept.drop()
    first = talk.ask(words(9, 4), piece=4)
    second = first + words(11, 5)
    right = talk.anew(second)
    assert talk.ask(second, piece=4) == right
    assert talk.kept.shared == len(first) - 1

    def stop(tokens: int) -> None:
        raise KeyboardInterrupt

    talk.kept.drop()
    cache = talk.kept.arguments(second)
    with pytest.raises(KeyboardInterrupt):
        talk.kept.compute(second, 8, stop)
    assert cache
    assert talk.ask(second) == right
    assert talk.kept.shared == 8  # the piece that was done before Ctrl-C


def test_interrupts_at_any_point(talk: Talk) -> None:
    """In the prompt, in the answer, and while the cache is cut or its contents are noted."""
    talk.kept.drop()
    begun = talk.ask(words(8, 6))
    longer, other = begun + words(6, 7), begun[:5] + words(6, 8)
    right, rest = talk.anew(longer), talk.anew(other)
    count = operations(lambda: talk.ask(longer))
    talk.ask(other)
    rng = random.Random(0)
    for _ in range(2):
        ended(lambda: talk.ask(longer, piece=3), rng.randrange(1, count), KeyboardInterrupt())
        assert talk.ask(other) == rest
        assert talk.ask(longer) == right


def test_the_second_turn_of_a_long_conversation_is_short(loader: Loader) -> None:
    talk = Talk(loader("mixtral", None))
    first = talk.ask(words(2000, 9))
    assert talk.computed == 2000 + TOKENS - 1
    talk.ask(first + words(40, 10))
    assert talk.computed - (TOKENS - 1) <= 0.15 * 2000


def test_caches_that_cannot_be_cut_are_not_kept(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(loader("mixtral", None))
    prompt = words(9, 11)
    right = talk.anew(prompt)
    assert talk.ask(prompt) == right
    for name, value in (("cache_implementation", "static"), ("use_cache", False)):
        config = type("Config", (), {name: value})
        assert talk.kept.arguments(prompt, config) == {}
        assert talk.kept.shared == 0

    rope = talk.model.config.rope_parameters
    monkeypatch.setitem(rope, "rope_type", "dynamic")
    assert talk.kept.arguments(prompt) == {}
    monkeypatch.undo()
