"""Several tokens behind a kept state are what they are in one pass, for every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from more_families import CHANGES
from one_thread import one_torch_thread
from transformers import AutoConfig

from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.hosts.transformers.prefixes import kinds
from hybrimoe_plugin.hosts.transformers.prefixes.store import PrefixStore

__all__ = ["one_torch_thread"]  # a fixture of this module

LENGTH = 40
SLIDING = {
    "gpt_oss": {"sliding_window": 8},
    "gemma4_text": {"sliding_window": 8},
    "llama4_text": {},  # chunks
    "phimoe": {"sliding_window": 8},
}
INDEXED: dict[str, dict[str, Any]] = {
    # So many heads that no two tokens score 0: which of them are chosen would be undecided.
    "deepseek_v32": {"index_n_heads": 16},
    "glm_moe_dsa": {"index_n_heads": 16},
}
WHOLE = {**SLIDING, **INDEXED, **{key: {} for key in kinds._LINEAR}}
CUT = ("deepseek_v3", "mixtral", "qwen3_moe")
REFUSED = ("deepseek_v4", "jamba", "zaya")
"""Wrong behind a state in transformers 5.24, or nothing is known of what their layers keep."""


def made(kind: str, **changes: Any) -> Any:
    try:
        AutoConfig.for_model(kind)
    except ValueError:
        pytest.skip(f"this release of transformers does not know {kind}")
    return shrunk_model(kind, **{**CHANGES.get(kind, {}), **changes}).eval()


def ids(seed: int, count: int = LENGTH) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(3, 96, (count,), generator=generator).tolist()
    return found


@torch.no_grad()
def logits(model: Any, tokens: list[int], cache: Any = None) -> torch.Tensor:
    """[T, V] of tokens behind what a cache holds."""
    options = {} if cache is None else {cache_name(model): cache, "use_cache": True}
    found: torch.Tensor = model(torch.tensor([tokens]), **options).logits[0]
    return found


def check_next(model: Any, store: PrefixStore, prompt: list[int], shared: int) -> Any:
    """Begin a prompt, check its logits and the likeliest tokens; gives its cache."""
    cache, found = store.begin(prompt)
    assert found == shared
    right = logits(model, prompt)[shared:]
    got = logits(model, prompt[shared:], cache)
    assert torch.allclose(got, right, atol=1e-4, rtol=0)
    assert torch.equal(got.argmax(-1), right.argmax(-1))
    return cache


@pytest.mark.parametrize("kind", sorted(WHOLE))
def test_whole_sequences_are_gone_on_with(kind: str) -> None:
    model = made(kind, **WHOLE[kind])
    store = PrefixStore(model, 2**30)
    first = ids(1)
    store.end(first, check_next(model, store, first, 0))
    # One token, fewer than a window or a convolution sees, and more.
    for number, count in enumerate((1, 2, 11)):
        longer = first + ids(2 + number, count + 1)
        cache = check_next(model, store, longer, len(first))
        store.end(longer, cache)
        first = longer
    assert store.sequences == 1  # each was handed over

    check_next(model, store, [*first[:-1], 5, 6], 0)  # another branch
    check_next(model, store, first, 0)  # its last token would have to be computed again
    assert store.sequences == 1


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_next"])
def test_copies_of_whole_sequences(kind: str) -> None:
    model = made(kind, **WHOLE[kind])
    store = PrefixStore(model, 2**30)
    system = ids(1)
    cache = check_next(model, store, system, 0)
    store.save(system, cache)
    one, other = system + ids(2, 9), system + ids(3, 12)
    got = logits(model, one[len(system) :], cache)  # the copy does not see it
    assert torch.allclose(got, logits(model, one)[len(system) :], atol=1e-4, rtol=0)
    begun, shared = store.begin(one + ids(4, 5), [(one, cache)])
    assert shared == len(one)
    logits(model, ids(4, 5), begun)
    check_next(model, store, other, len(system))
    got = logits(model, ids(5, 3), cache)  # nor does the running one see what was copied from it
    assert torch.allclose(got, logits(model, one + ids(5, 3))[len(one) :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CUT)
def test_any_beginning_is_gone_on_with(kind: str) -> None:
    model = made(kind)
    store = PrefixStore(model, 2**30)
    first = ids(1)
    store.end(first, check_next(model, store, first, 0))
    check_next(model, store, first, LENGTH - 1)
    for shared in (1, 17, LENGTH - 1):
        branch = [*first[:shared], first[shared] ^ 1, *ids(2, 6)]
        check_next(model, store, branch, shared)
        assert store.sequences == 1
    longer = first + ids(3, 7)
    store.end(longer, check_next(model, store, longer, LENGTH))
    assert store.sequences == 1


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_proved_is_not_kept(kind: str) -> None:
    model = made(kind)
    store = PrefixStore(model, 2**30)
    first = ids(1)
    cache, _ = store.begin(first)
    logits(model, first, cache)
    store.end(first, cache)
    assert store.sequences == 0
    assert store.begin([*first, 5, 6], [(first, cache)])[1] == 0


def test_moving_positions_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("mixtral")
    monkeypatch.setitem(model.config.rope_parameters, "rope_type", "dynamic")
    assert not kinds.can_go_on(model)
