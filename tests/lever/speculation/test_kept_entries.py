"""The caller's KV cache after an answer that was interrupted: what plain decoding leaves, and fit
to go on with.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from interrupts import ended, operations
from transformers import DynamicCache

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import GrowingLayer, cache_name
from hybrimoe_plugin.hosts.transformers.load import load_plain_model
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import low_bit_copy
from lever_ext.placement.split import Place
from lever_ext.speculation.verify import Verifier
from lever_ext.target import load_target
from lever_ext.tree.policies import make_policy
from tests.lever.helpers import a_gate, prompt

TIMES = int(os.environ.get("HYBRIMOE_LONG", 6))
"""Interrupts for each kind of cache."""
TOKENS = 10
GREEDY = {"do_sample": False, "eos_token_id": None}
KINDS = ("in memory", "growing", "window", "flash", "flash, pruned", "flash, split")
PLACES = (Place.STAYS, Place.COPIED, Place.CPU, Place.COPIED)


class Case(NamedTuple):
    model: Any
    decoder: LeverDecoding
    alone: torch.Tensor

    def cache(self) -> Any:
        return DynamicCache(config=self.model.config)

    def ask(self, ids: torch.Tensor, cache: Any, **more: Any) -> torch.Tensor:
        found: torch.Tensor = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.alone.shape[1] - ids.shape[1],
            **{cache_name(self.model): cache},
            **GREEDY,
            **more,
        )
        return found

    def interrupted(
        self, cache: Any, watch: Callable[[list[int]], None] = lambda seen: None
    ) -> list[int]:
        """The tokens that the streamer of a speculative answer got; `watch` is called with them
        after each.
        """
        seen: list[int] = []

        class Streamer:
            def put(self, value: torch.Tensor) -> None:
                seen.extend(value.tolist())
                watch(seen)

            def end(self) -> None:
                pass

        self.decoder.streamer = Streamer()
        try:
            self.ask(prompt(0), cache, custom_generate=self.decoder)
        except KeyboardInterrupt:
            pass
        finally:
            self.decoder.streamer = None
        return seen

    def check_goes_on(self, cache: Any, seen: list[int]) -> None:
        ids = torch.cat([prompt(0), torch.tensor([seen], dtype=torch.long)], 1)
        assert torch.equal(ids, self.alone[:, : ids.shape[1]])
        assert len({layer.get_seq_length() for layer in cache.layers}) <= 1
        if ids.shape[1] < self.alone.shape[1]:
            for more in ({}, {"custom_generate": self.decoder}):
                assert torch.equal(self.ask(ids, copy.deepcopy(cache), **more), self.alone)


@pytest.fixture(scope="module", params=KINDS)
def case(
    request: pytest.FixtureRequest,
    plain_models: dict[str, Any],
    packs: dict[str, Path],
    tmp_path_factory: Any,
) -> Iterator[Case]:
    kind, _, how = request.param.partition(", ")
    target, policy = None, make_policy("fixed", 6)
    with ExitStack() as stack:
        if kind == "growing":
            path = tiny.write(tmp_path_factory.mktemp("growing"), "mixtral")
            model, _ = load_model(None, path, dtype="float32", cpu_backend="torch", progress=False)
            plain, _ = load_plain_model(None, path, dtype="float32", progress=False)
        elif kind == "window":
            model = plain = tiny.model("mixtral", sliding_window=8)
            policy = make_policy("none")
        else:
            model = plain = plain_models["llama"]
        if kind == "flash":
            there: dict[str, Any] = {"device": "emulated", "vram_budget": "1GiB", "places": PLACES}
            target = load_target(packs["llama"], **(there if how == "split" else {}))
            stack.callback(target.close)
            target.set_gate(a_gate(plain) if how == "pruned" else None)
            model = target.model
        draft = LanguageModelDraft(low_bit_copy(plain, 3, 32) if kind == "flash" else plain)
        decoder = LeverDecoding(draft, policy, target, prune="always")
        stack.callback(decoder.close)
        made = Case(model, decoder, plain.generate(prompt(0), max_new_tokens=TOKENS, **GREEDY))
        cache = made.cache()
        assert torch.equal(made.ask(prompt(0), cache, custom_generate=decoder), made.alone)
        assert all(isinstance(layer, GrowingLayer) == (kind == "growing") for layer in cache.layers)
        yield made


@pytest.mark.parametrize("who", ["streamer", "criteria"])
def test_an_error_of_the_callers_own(case: Case, who: str) -> None:
    for count in (1, 2, 4, 7):
        cache, text = case.cache(), list[int]()

        def stop(ids: torch.Tensor, _: Any = None, **__: Any) -> bool:
            text[:] = ids[0, 9:].tolist()  # noqa: B023
            if len(text) == count:  # noqa: B023
                raise ZeroDivisionError
            return False

        def put(seen: list[int]) -> None:
            stop(torch.tensor([[*prompt(0)[0].tolist(), *seen]]))

        with pytest.raises(ZeroDivisionError):
            if who == "streamer":
                case.interrupted(cache, put)
            else:
                case.ask(prompt(0), cache, custom_generate=case.decoder, stopping_criteria=[stop])
        assert cache.get_seq_length() == 9 + count - 1
        case.check_goes_on(cache, text)


@pytest.mark.slow
def test_an_interrupt_at_any_point(case: Case) -> None:
    rng = random.Random(0)
    count = operations(lambda: case.interrupted(case.cache()))
    reached = 0
    for _ in range(TIMES):
        cache, seen, place = case.cache(), list[int](), rng.randint(1, count)
        reached += ended(lambda: seen.extend(case.interrupted(cache)), place, KeyboardInterrupt())  # noqa: B023
        if cache.get_seq_length() != 9 + len(
            seen
        ):  # as the streamer was being called: its caller has a row too many
            case.check_goes_on(cache, seen)
    assert reached >= TIMES // 2


def test_an_interrupt_within_a_pass(case: Case) -> None:
    for count in (1, 2, 3):
        calls = itertools.count(1)

        def stop(*_: Any) -> None:
            if next(calls) == count:  # noqa: B023
                raise KeyboardInterrupt

        cache, hook = case.cache(), case.model.base_model.layers[1].register_forward_pre_hook(stop)
        seen = case.interrupted(cache)
        hook.remove()
        assert cache.get_seq_length() == (9 + len(seen) - 1 if seen else 0)
        case.check_goes_on(cache, seen)


def test_an_interrupt_while_a_row_is_placed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entries are where they belong in the first layer only."""
    real = Verifier.place

    def place(self: Verifier, cache: Any, verified: Any, row: int, depth: int) -> None:
        if row == depth:
            return real(self, cache, verified, row, depth)
        first = copy.copy(cache)
        first.layers = cache.layers[:1]
        real(self, first, verified, row, depth)
        raise KeyboardInterrupt

    cache = case.cache()
    with monkeypatch.context() as patch:
        patch.setattr(Verifier, "place", place)
        seen = case.interrupted(cache)
    assert len(seen) < TOKENS or case.decoder.policy.name == "none"
    assert cache.get_seq_length() == 9 + len(seen) - 1
    case.check_goes_on(cache, seen)
