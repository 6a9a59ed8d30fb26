"""Attention with split keys against float64, in Triton's interpreter or on a GPU; and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrimoe_plugin.compute.attention.decode_attention import (
    AttentionShape,
    GQAShape,
    MLAShape,
)

pytest.importorskip("triton")
from hybrimoe_plugin.compute.attention.split_attention import SplitAttention

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative RMS difference from float64, of the same rounded keys, values and queries."""
CAPACITY = 300
"""No whole number of tiles."""

SHAPES = (
    GQAShape(8, 1, 128, CAPACITY, torch.float32, 128**-0.5),
    GQAShape(8, 8, 64, CAPACITY, torch.float32, 0.125),
    GQAShape(6, 2, 96, CAPACITY, torch.float32, 0.1),
    GQAShape(34, 2, 80, CAPACITY, torch.float32, 0.1),  # more query heads than a program has
    GQAShape(4, 2, 256, CAPACITY, torch.float32, 0.0625),
    GQAShape(4, 2, 8, CAPACITY, torch.float32, 0.35),  # narrower than a matrix product
    MLAShape(16, 512, 64, CAPACITY, torch.float32, 192**-0.5),
    MLAShape(20, 40, 24, CAPACITY, torch.float32, 0.1),
)


def exact(
    shape: AttentionShape, held: int, query: torch.Tensor, *cache: torch.Tensor
) -> torch.Tensor:
    """Float64, written out: [heads, width of values]."""
    seen = [part[0, :, : held + 1].double() for part in cache]
    keys = seen[0].repeat_interleave(shape.heads // shape.groups, 0)
    values = seen[-1].repeat_interleave(shape.heads // shape.groups, 0)[..., : shape.widths.output]
    scores = torch.einsum("hd,hsd->hs", query[0, :, 0].double(), keys) * shape.scaling
    return torch.einsum("hs,hsd->hd", scores.softmax(-1), values)


def example(shape: AttentionShape, held: int) -> tuple[torch.Tensor, ...]:
    """Queries and buffers; what lies behind the token is no number."""
    torch.manual_seed(held)
    query, *cache = shape.example(DEVICE)
    query *= 3.0  # so that some entries count and others do not
    for buffer in cache:
        buffer[:, :, held + 1 :] = float("nan")
        buffer[:, :, held + 2 :: 2] = float("inf")
    return query, *cache


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found[0, :, 0].double() - wanted).norm() / wanted.norm())


def run(shape: AttentionShape, ranges: int | None, held: int) -> float:
    """The error at one position, in memory that holds no number before."""
    position = torch.tensor([held], device=DEVICE)
    kernel = SplitAttention(shape, DEVICE, position, ranges)
    for left in (kernel._sums, kernel._maxima, kernel._totals):
        left.fill_(float("nan"))
    given = example(shape, held)
    return error(kernel(*given), exact(shape, held, *given))


def named(shape: AttentionShape) -> str:
    return f"{shape.heads}x{shape.widths.main}"


@pytest.mark.parametrize("ranges", [1, 3, 16])
@pytest.mark.parametrize("held", [0, 1, 31, 63, 64, 100, 298, 299])
def test_it_equals_float64_and_reads_nothing_behind_the_token(held: int, ranges: int) -> None:
    assert run(SHAPES[5], ranges, held) < LIMITS[torch.float32]


@pytest.mark.parametrize(("held", "ranges"), [(0, 8), (130, 2), (299, 4)])
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_every_shape(shape: AttentionShape, held: int, ranges: int) -> None:
    assert run(shape, ranges, held) < LIMITS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6]], ids=named)
def test_16_bit_types(shape: AttentionShape, dtype: torch.dtype) -> None:
    rounded = shape._replace(dtype=dtype)  # type: ignore[attr-defined]
    assert run(rounded, 4, 200) < LIMITS[dtype]


def test_a_step_follows_the_position_and_leaves_nothing_of_longer_ones() -> None:
    """The same kernel at falling positions: ranges that are not used hold old sums."""
    shape = SHAPES[2]
    position = torch.tensor([0], device=DEVICE)
    kernel = SplitAttention(shape, DEVICE, position, 4)
    for held in (299, 140, 3, 0, 200):
        given = example(shape, held)
        position.fill_(held)
        assert error(kernel(*given), exact(shape, held, *given)) < LIMITS[torch.float32]


def test_ranges_fill_the_device_and_no_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)

    def ranges(shape: Any, capacity: int) -> int:
        kernel = SplitAttention(shape, DEVICE, torch.zeros(1, device=DEVICE), 1)
        return kernel._ranges_for(capacity, cuda)

    grouped = GQAShape(32, 4, 128, 4096, torch.bfloat16, 0.1)
    latent = MLAShape(16, 512, 64, 4096, torch.bfloat16, 0.1)
    assert ranges(grouped, 32768) == 66, "4 key heads: 264 programs on 132 multiprocessors"
    assert ranges(grouped, 4096) == 64, "tiles of 64 tokens"
    assert ranges(grouped, 256) == 4
    assert ranges(latent, 4096) == 128
    assert ranges(latent._replace(heads=128), 4096) == 33, "8 programs for the heads"


def test_strides_are_followed() -> None:
    """Queries come as a part of all heads, keys and values as buffers with room between heads."""
    shape = SHAPES[2]
    held = 70
    query, keys, values = example(shape, held)
    wanted = exact(shape, held, query, keys, values)
    heads = torch.cat((query.transpose(1, 2), torch.randn(1, 1, 3, 96, device=DEVICE)), 2)
    query = heads.transpose(1, 2)[:, : shape.heads]
    wide = torch.full((1, 2, CAPACITY + 5, 100), float("nan"), device=DEVICE)
    wide[:, :, :CAPACITY, :96] = keys
    kernel = SplitAttention(shape, DEVICE, torch.tensor([held], device=DEVICE), 2)
    found = kernel(query, wide[:, :, :CAPACITY, :96], values)
    assert error(found, wanted) < LIMITS[torch.float32]


@pytest.mark.slow
def test_they_compile_for_gpus_without_spills() -> None:
    program = Path(__file__).with_name("compile_attention.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(program), "--arch", "80", "90", "120"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == 3 * 16
