"""One token's attention over a cache, and its rotation."""

from __future__ import annotations

import math

import pytest
import torch

from hybrimoe_plugin.compute.attention.rope import rotate_halves, rotate_interleaved
from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
from hybrimoe_plugin.compute.cpu.native.kernels import Kernels
from hybrimoe_plugin.compute.cpu.native.token_attention import AttendedCache, Rotating

CAPACITY = 320


@pytest.fixture
def graph(ggml: Ggml, kernels: Kernels) -> NativeGraph:
    return NativeGraph(ggml, kernels, 2)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Attended:
    """A graph of attention alone, and torch's own attention beside it."""

    def __init__(
        self, graph: NativeGraph, key_heads: int, group: int, width: int, value_width: int
    ) -> None:
        self.graph = graph
        self.query = random(key_heads * group, width)
        self.key = random(1, key_heads * width)
        self.value = random(1, key_heads * value_width)
        key, value = graph.wrap(self.key), graph.wrap(self.value)
        self.scaling = 1 / math.sqrt(width)
        self.out, self.cache = graph.attend(
            self.query, key, value, key_heads, value_width, self.scaling
        )
        graph.finish(self.out)

    def run(self, keys: torch.Tensor, values: torch.Tensor, held: int) -> torch.Tensor:
        assert self.cache.fits(keys, values)
        self.cache.set(keys, values, held)
        self.graph.run()
        return self.out.value

    def wanted(self, keys: torch.Tensor, values: torch.Tensor, held: int) -> torch.Tensor:
        """[heads, W] over copies of what is held and the new entry."""
        heads, width = keys.shape[1], keys.shape[3]
        held_keys = torch.cat((keys[0, :, :held], self.key.view(heads, 1, width)), 1)
        held_values = torch.cat((values[0, :, :held], self.value.view(heads, 1, -1)), 1)
        query = self.query.view(heads, -1, width).double()
        scores = self.scaling * query @ held_keys.double().transpose(1, 2)
        return (scores.softmax(-1) @ held_values.double()).flatten(0, 1).float()


@pytest.mark.parametrize("held", [1, 15, 16, 17, 63, 64, 300])
@pytest.mark.parametrize("group", [1, 3, 8, 16])
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (128, 128), (40, 24), (256, 256)])
def test_attention(
    graph: NativeGraph, key_heads: int, group: int, width: int, value_width: int, held: int
) -> None:
    attended = Attended(graph, key_heads, group, width, value_width)
    keys = random(1, key_heads, CAPACITY, width)
    values = random(1, key_heads, CAPACITY, value_width)
    wanted = attended.wanted(keys, values, held)
    found = attended.run(keys, values, held)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_entry_is_written_behind_those_that_are_held(graph: NativeGraph) -> None:
    attended = Attended(graph, 3, 2, 32, 48)
    keys, values = random(1, 3, CAPACITY, 32), random(1, 3, CAPACITY, 48)
    before = keys.clone(), values.clone()
    attended.run(keys, values, 20)
    for buffer, old, new in zip(
        (keys, values), before, (attended.key, attended.value), strict=True
    ):
        assert torch.equal(buffer[0, :, 20], new.view(3, -1))
        old[:, :, 20] = buffer[:, :, 20]
        assert torch.equal(buffer, old)


def test_a_cache_grows_and_shrinks_and_is_changed_for_another(graph: NativeGraph) -> None:
    attended = Attended(graph, 2, 4, 64, 64)
    for seed, held in enumerate((1, 300, 20, 299, 1)):
        shape = (1, 2, CAPACITY + seed, 64)
        keys, values = random(*shape), random(*shape) + 1
        wanted = attended.wanted(keys, values, held)
        torch.testing.assert_close(attended.run(keys, values, held), wanted, rtol=1e-5, atol=1e-5)


def test_caches_whose_entries_lie_apart(graph: NativeGraph) -> None:
    """As pages do, with the heads of a token side by side."""
    attended = Attended(graph, 2, 3, 64, 32)
    keys = random(1, CAPACITY, 2, 96)[..., 8:72].transpose(1, 2)
    values = random(1, CAPACITY, 2, 32).transpose(1, 2)
    wanted = attended.wanted(keys, values, 50)
    torch.testing.assert_close(attended.run(keys, values, 50), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("held", [1, 16, 17, 300])
@pytest.mark.parametrize("heads", [1, 16, 21])
def test_latents_are_keys_and_values(graph: NativeGraph, heads: int, held: int) -> None:
    latent, rope = 512, 64
    query, entry = random(heads, latent + rope), random(1, latent + rope)
    out, cache = graph.attend(query, graph.wrap(entry), None, 1, latent, 0.07)
    graph.finish(out)
    keys = random(1, 1, CAPACITY, latent + rope)
    values = keys.new_empty(1, 1, CAPACITY, 0)
    assert cache.fits(keys, values)
    cache.set(keys, values, held)
    graph.run()
    assert torch.equal(keys[0, 0, held], entry[0])
    held_keys = keys[0, 0, : held + 1].double()
    scores = 0.07 * query.double() @ held_keys.T
    wanted = scores.softmax(-1) @ held_keys[:, :latent]
    torch.testing.assert_close(out.value, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [100.0, 1e15])
def test_large_scores(graph: NativeGraph, size: float) -> None:
    """One token gets all the weight, in whichever block it lies."""
    attended = Attended(graph, 1, 2, 64, 64)
    keys, values = 1e-3 * random(1, 1, CAPACITY, 64), random(1, 1, CAPACITY, 64)
    for at in (0, 100, 255, 256, 299):
        scored = keys.clone()
        scored[0, 0, at] = size * attended.query[0]
        wanted = attended.wanted(scored, values, 300)
        found = attended.run(scored, values, 300)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 16, 299])
def test_what_is_no_number_spreads_to_the_heads_that_read_it(
    graph: NativeGraph, bad: float, at: int
) -> None:
    attended = Attended(graph, 2, 3, 64, 64)
    keys, values = random(1, 2, CAPACITY, 64), random(1, 2, CAPACITY, 64)
    keys[0, 1, at, 5] = bad
    attended.query[:, 5] = 1.0
    found = attended.run(keys, values, 300)
    assert found[:3].isfinite().all() and found[3:].isnan().all()


def test_what_lies_behind_the_entries_does_not_matter(graph: NativeGraph) -> None:
    attended = Attended(graph, 1, 1, 64, 64)
    keys, values = random(1, 1, CAPACITY, 64), random(1, 1, CAPACITY, 64)
    keys[:, :, 21:] = math.nan
    values[:, :, 21:] = math.inf
    assert attended.run(keys, values, 20).isfinite().all()


def cache(graph: NativeGraph) -> AttendedCache:
    return Attended(graph, 2, 3, 64, 32).cache


def test_other_caches_do_not_fit(graph: NativeGraph) -> None:
    """What another model wrote, or another device, or several sequences."""
    attended = cache(graph)
    keys, values = torch.zeros(1, 2, 8, 64), torch.zeros(1, 2, 8, 32)
    assert attended.fits(keys, values)
    for other in (
        (keys[:, :1], values),
        (keys, values[:, :1]),
        (keys[..., :32], values),
        (torch.zeros(1, 2, 8, 128), values),
        (keys, values[..., :16]),
        (keys, values[..., :0]),
        (keys.double(), values),
        (keys, values.bfloat16()),
        (keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1)),
        (torch.zeros(1, 2, 64, 64).transpose(2, 3), values),
        (keys.to("meta"), values.to("meta")),
    ):
        assert not attended.fits(*other)


@pytest.mark.parametrize("width", [2, 30, 64, 128])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(graph: NativeGraph, width: int, interleaved: bool) -> None:
    """Of several heads, into a part of a wider result, at one position after the other."""
    half = width // 2
    low = torch.arange(half)
    first, second = (2 * low, 2 * low + 1) if interleaved else (low, low + half)
    by = torch.empty(width), torch.empty(width)
    rotation = Rotating(torch.cat((first, second)), torch.cat((second, first)), *by)
    x = graph.input(5, width)
    out = torch.full((5, width + 3), 7.0)
    graph.finish(graph.rotate(x, rotation, out[:, :width]))
    x.fill(random(5, width))
    for position in (0.0, 1.0, 1000.0):
        angles = position * torch.logspace(0, -4, half)
        cos, sin = angles.cos(), angles.sin()
        by[0].copy_(torch.cat((cos, cos)))
        by[1].copy_(torch.cat((-sin, sin)))
        graph.run()
        plain = rotate_interleaved if interleaved else rotate_halves
        torch.testing.assert_close(out[:, :width], plain(x.value, cos, sin))
    assert (out[:, width:] == 7).all()
