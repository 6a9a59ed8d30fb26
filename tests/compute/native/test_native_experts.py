"""Experts by the operations against the plain reference, and against ggml's own graphs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_experts
import torch

from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.cpu.ggml_stored import StoredExperts
from hybrimoe_plugin.compute.cpu.ggml_union import addresses_of
from hybrimoe_plugin.compute.cpu.native.kernels import Kernels
from hybrimoe_plugin.compute.cpu.native.many_tokens import by_tiles, can_tile
from hybrimoe_plugin.compute.cpu.native.single_token import NativeSingleToken
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.core import SILU, Activation
from hybrimoe_plugin.weights.layer_weights import Biases, LayerWeights

TYPES = {
    ("Q8_0", "Q8_0", "Q8_0"): 0.03,
    ("Q4_0", "Q4_1", "Q5_0"): 0.03,
    ("F32", "F32", "F32"): 1e-5,
    ("BF16", "Q8_0", "F16"): 0.03,
}
"""Relative error that rounding may cost: three products of 8 bits."""
ACTIVATIONS = [
    SILU,
    Activation("gelu_tanh"),
    Activation("relu"),
    Activation("silu", alpha=1.702, limit=7.0, up_shift=1.0),
]
BY_TILES = 0.01
"""And by tiles in bfloat16."""


def call(tokens: int, top_k: int, experts: int = 8) -> tuple[torch.Tensor, ...]:
    """Hidden states [T, 64], ids [T, K] and weights [T, K]."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    hidden = torch.randn(tokens, 64, generator=generator)
    return hidden, ids, torch.rand(tokens, top_k, generator=generator)


def reference(weights: LayerWeights, *arguments: torch.Tensor, kept: Any = None) -> torch.Tensor:
    plain = TorchExperts(keep=True)
    plain.add_layer(weights)
    hidden, ids, routing = arguments
    if kept is not None:
        routing = routing.masked_fill(~kept, 0)
    plain.submit(0, hidden, ids, routing, list(range(weights.spec.experts)))
    return plain.sync()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def with_biases(weights: LayerWeights, activation: Activation = SILU) -> LayerWeights:
    """The same experts with biases, and another activation."""
    spec = replace(weights.spec, activation=activation)
    random = np.random.default_rng(0)
    packed = random.standard_normal((spec.experts, 2 * spec.intermediate + spec.hidden), np.float32)
    return replace(weights, spec=spec, biases=Biases(packed, spec.intermediate))


@pytest.fixture
def stored(ggml: Ggml) -> Any:
    """Makes a layer's stored experts for so many threads."""
    return lambda weights, threads=2: StoredExperts.of(ggml, threads, weights, repack=False)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_one_token(kernels: Kernels, stored: Any, types: Any, top_k: int) -> None:
    weights = tiny_experts.layer(types=types, top_k=top_k)
    experts = stored(weights)
    single = NativeSingleToken(kernels, experts, addresses_of(experts), top_k)
    for seed in range(3):
        hidden, ids, routing = call(seed + 1, top_k)
        arguments = hidden[-1:], ids[-1:], routing[-1:]
        wanted = reference(weights, *arguments)
        assert error(single.compute(*arguments), wanted) < TYPES[types]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_biases_and_other_activations(activation: Activation, tokens: int) -> None:
    weights = with_biases(tiny_experts.layer(types=("Q8_0",) * 3), activation)
    experts = GgmlExperts(2)
    assert experts.name == "operations"
    experts.add_layer(weights)
    arguments = call(tokens, 2)
    assert error(experts.compute(0, *arguments), reference(weights, *arguments)) < 0.03


@pytest.mark.parametrize("types", [("Q8_0", "Q8_0", "Q8_0"), ("Q4_0", "Q4_1", "Q5_0")])
@pytest.mark.parametrize("tokens", [1, 12, 33, 600])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_many_tokens(kernels: Kernels, stored: Any, types: Any, tokens: int, top_k: int) -> None:
    """Some have no more than a row for an expert."""
    weights = tiny_experts.layer(types=types, top_k=top_k)
    experts = stored(weights)
    if not can_tile(kernels, experts):
        pytest.skip("this processor has no tiles")
    arguments = call(tokens, top_k)
    found = by_tiles(kernels, experts, addresses_of(experts), *arguments)
    assert error(found, reference(weights, *arguments)) < BY_TILES


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_choices_that_do_not_count(kernels: Kernels, stored: Any, share: float) -> None:
    """Their rows are not computed, and tokens without any get zeros."""
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    experts = stored(weights)
    if not can_tile(kernels, experts):
        pytest.skip("this processor has no tiles")
    arguments = call(100, 2)
    kept = torch.rand(100, 2, generator=torch.Generator().manual_seed(1)) < share
    found = by_tiles(kernels, experts, addresses_of(experts), *arguments, kept)
    wanted = reference(weights, *arguments, kept=kept)
    assert float((found - wanted).norm()) <= BY_TILES * float(wanted.norm())
    assert not found[~kept.any(1)].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_a_token_with_no_number_is_alone_with_it(tokens: int, bad: float) -> None:
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    experts = GgmlExperts(2)
    experts.add_layer(weights)
    hidden, ids, routing = call(tokens, 2)
    wanted = experts.compute(0, hidden, ids, routing)
    hidden[0, 9] = bad
    found = experts.compute(0, hidden, ids, routing)
    assert not found[0].isfinite().any()
    torch.testing.assert_close(found[1:], wanted[1:], rtol=1e-4, atol=1e-4)
    hidden[0, 9] = 0.0
    assert experts.compute(0, hidden, ids, routing).isfinite().all()


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_token_that_does_not_count_may_be_no_number(tokens: int) -> None:
    experts = GgmlExperts(2)
    experts.add_layer(tiny_experts.layer(types=("Q8_0",) * 3))
    hidden, ids, routing = call(tokens, 2)
    ids[0], ids[1:] = torch.tensor([6, 7]), ids[1:] % 3
    if tokens > 1:
        ids[1:, 1] = 3
    hidden[0] = math.nan
    experts.submit(0, hidden, ids, routing, [0, 1, 2, 3])
    assert experts.sync().isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5, 40, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_twins_are_the_same_function(tokens: int, dtype: torch.dtype) -> None:
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    hidden, ids, routing = call(tokens, 2)
    hidden, routing = hidden.to(dtype), routing.to(dtype)
    found = []
    for operations in (False, True):
        experts = GgmlExperts(2, operations=operations)
        experts.add_layer(weights)
        found.append(experts.compute(0, hidden, ids, routing))
        assert found[-1].dtype == dtype and found[-1].shape == hidden.shape
    assert error(found[1].float(), found[0].float()) < 0.03


@pytest.mark.parametrize("tokens", [1, 40])
def test_results_survive_later_calls(tokens: int) -> None:
    experts = GgmlExperts(2)
    experts.add_layer(tiny_experts.layer(types=("Q8_0",) * 3))
    first = experts.compute(0, *call(tokens, 2))
    kept = first.clone()
    experts.compute(0, *(call(tokens + 1, 2) if tokens > 1 else call(2, 2)))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("tokens", [1, 100])
def test_any_number_of_threads_gives_the_same(tokens: int) -> None:
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    found = []
    for threads in (1, 2, 3, 64):
        experts = GgmlExperts(threads)
        experts.add_layer(weights)
        found.append(experts.compute(0, *call(tokens, 2)))
    assert all(torch.equal(found[0], other) for other in found[1:])
