"""What crosses between two accelerators in a pass, on fakes that compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import step
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from two_devices import FIRST, SECOND, Devices, OnDevice, move

from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.hosts.transformers.devices import Arrivals, spread

WIDTH, HEAD, WORDS = 32, 16, 40
PLACES = {"model.layers.1.mlp.experts": "meta:0", "model.layers.5.mlp.experts": "meta:1"}
"""Layers 0 and 1 on the first device, 2 to 5 on the second."""


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=WORDS,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def spread_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(nn.Module, "to", move)
    whole = model()
    with Devices(), torch.no_grad():
        spread(whole, PLACES)
    return whole


def values(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, OnDevice)
    assert tensor.device == FIRST, "where the host samples"
    return tensor.values


def test_a_pass_crosses_once_and_the_host_never_waits(spread_model: Any) -> None:
    plain = model()
    ids = torch.randint(WORDS, (1, 7), generator=torch.Generator().manual_seed(1))
    embeddings = [(1, 1, HEAD)] * 2  # cos and sin
    cache = plain_cache = None
    for token in range(4):
        count = ids.shape[1]
        with torch.no_grad():
            wanted = step(plain, ids, plain_cache)
            with Devices() as seen:
                found = step(spread_model, OnDevice(ids, FIRST), cache)
                logits = values(found.logits)
        torch.testing.assert_close(logits, wanted.logits)
        assert seen.stops == []
        shapes = [(1, count, WIDTH), (1, count), *[(1, count, HEAD)] * 2, (1, count, WORDS)]
        if token:
            assert sorted(seen.crossings) == sorted(shapes), "for four layers on the second device"
            assert embeddings == shapes[2:4]
        else:
            # A prompt may have a mask, which crosses once too.
            assert len(seen.crossings) <= len(shapes) + 1
            assert set(shapes) <= set(seen.crossings)
        cache, plain_cache = cache_in(found), cache_in(wanted)
        ids = wanted.logits[:, -1:].argmax(-1)


def test_a_tensor_that_its_owner_writes_to_crosses_anew() -> None:
    """The same object in two passes, as in static buffers for compiled graphs."""
    arrive = Arrivals(SECOND)
    mask = OnDevice(torch.zeros(1, 4), FIRST)
    embeddings = (OnDevice(torch.ones(2), FIRST), OnDevice(torch.ones(2), FIRST))
    for number in range(3):
        mask.values.fill_(number)
        hidden: torch.Tensor = OnDevice(torch.full((1, 3), 7.0), FIRST)
        with Devices() as seen:
            copies = []
            for _layer in range(3):
                named = {"mask": mask, "position_embeddings": embeddings, "flag": None}
                (hidden,), found = arrive(nn.Identity(), (hidden,), named)
                assert hidden.device == SECOND
                assert found["flag"] is None
                assert found["mask"].values.unique().tolist() == [number]
                copies.append((found["mask"], *found["position_embeddings"]))
            assert all(one is other for one, other in zip(*copies[:2], strict=True)), "the same"
        assert sorted(seen.crossings) == [(1, 3), (1, 4), (2,), (2,)]


def test_copies_live_no_longer_than_what_was_copied() -> None:
    arrive = Arrivals(SECOND)
    with Devices():
        hidden = OnDevice(torch.zeros(1, 3), SECOND)
        mask = OnDevice(torch.zeros(1, 4), FIRST)
        arrive(nn.Identity(), (hidden,), {"mask": mask})
        assert len(arrive._copies) == 1
        del mask
        assert len(arrive._copies) == 0


def test_a_layer_called_by_keywords_alone_is_followed() -> None:
    arrive = Arrivals(SECOND)
    with Devices() as seen:
        hidden = OnDevice(torch.zeros(1, 3), FIRST)
        inputs, named = arrive(nn.Identity(), (), {"hidden_states": hidden})
    assert inputs == ()
    assert named["hidden_states"].device == SECOND
    assert seen.crossings == [(1, 3)]


def test_the_fakes_find_what_a_real_machine_would() -> None:
    with Devices() as seen:
        one, other = OnDevice(torch.ones(2), FIRST), OnDevice(torch.ones(2), SECOND)
        with pytest.raises(RuntimeError, match="one device"):
            one + other
        assert seen.stops == []
        float(one.sum())
        one.to("cpu")
        assert seen.stops == ["_local_scalar_dense", "copy to the CPU"]
        assert (one + other.to(FIRST)).values.tolist() == [2.0, 2.0]
        assert seen.crossings == [(2,)]
