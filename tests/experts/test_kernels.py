"""Triton kernels against gguf's own dequantisation, in the interpreter where there is no GPU; and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import random_call, random_layer, reference, rms_error

from hybrimoe_plugin.experts.kernels.base import Kernels, SlotCall
from hybrimoe_plugin.experts.kernels.layout import BLOCK_BYTES, PLANES, slot_layout
from hybrimoe_plugin.experts.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.experts.weights import LayerWeights

pytest.importorskip("triton")
from hybrimoe_plugin.experts.kernels.blocks import Blocks
from hybrimoe_plugin.experts.kernels.formats import SUPPORTED
from hybrimoe_plugin.experts.kernels.triton_ops import TritonKernels

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
LARGE = Blocks(256, 4, 256, 2, tokens=16, rows=256)
"""The interpreter takes as long for a small tile as for a large one."""

MIXED = [
    # kinds, hidden, intermediate, experts, top_k
    (("Q4_K", "Q5_K", "Q8_0"), 256, 320, 4, 2),
    (("Q8_0", "Q4_0", "Q6_K"), 576, 256, 2, 2),
    (("Q8_0", "Q8_0", "Q4_0"), 96, 160, 5, 1),
    (("Q4_K", "Q4_K", "Q6_K"), 256, 1536, 2, 2),
    (("BF16", "F16", "Q5_K"), 64, 512, 4, 3),
]


def fill(kernels: Kernels, weights: LayerWeights, mine: list[int]) -> torch.Tensor:
    """Slots with these experts and a spare one full of garbage."""
    layout = kernels.layout(weights.spec)
    buffer = torch.full((len(mine) + 1, layout.size), 0xAB, dtype=torch.uint8, device=DEVICE)
    for slot, expert in enumerate(mine):
        for part, matrix in zip(layout, weights.matrices(), strict=True):
            raw = torch.from_numpy(matrix.experts[expert].copy()).to(DEVICE)
            target = buffer[slot, part.offset : part.offset + part.size]
            if part.split:
                kernels.repack(part, raw, target)
            else:
                target.copy_(raw)
    return buffer


def check(
    kernels: Kernels, weights: LayerWeights, tokens: int, mine: list[int], dtype: torch.dtype = torch.float32
) -> float:
    """Relative RMS error where only the experts `mine` have slots."""
    spec = weights.spec
    buffer = fill(kernels, weights, mine)
    hidden, ids, routing = random_call(tokens, spec.experts, spec.hidden, spec.top_k, seed=tokens)
    hidden = hidden.to(dtype)
    table = torch.full((spec.experts,), -1)
    table[torch.tensor(mine)] = torch.arange(len(mine))
    on_device = [tensor.to(DEVICE) for tensor in (hidden, table[ids], routing)]
    call = SlotCall(buffer, kernels.layout(spec), tuple(range(len(mine))), *on_device)
    found = kernels.down(call, kernels.gate_up(call))
    assert found.dtype == dtype
    assert found.shape == hidden.shape
    return rms_error(found.cpu(), reference(weights, hidden, ids, routing, set(mine)))


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_type_equals_the_reference(kind: str, tokens: int) -> None:
    weights = random_layer((kind,) * 3, experts=2)
    assert check(TritonKernels(DEVICE, LARGE), weights, tokens, [1, 0]) < 1e-6


@pytest.mark.parametrize("tokens", [2, 24])
@pytest.mark.parametrize("case", MIXED)
def test_mixed_types_and_odd_shapes(case: tuple[tuple[str, str, str], int, int, int, int], tokens: int) -> None:
    kinds, hidden, intermediate, experts, top_k = case
    weights = random_layer(kinds, hidden, intermediate, experts, top_k)
    kernels = TritonKernels(DEVICE, LARGE)
    assert kernels.refusal(weights.spec) is None
    # All but one resident; K may be all experts; with few tokens some expert has none.
    assert check(kernels, weights, tokens, list(range(experts - 1, 0, -1))) < 1e-6


@pytest.mark.parametrize("tokens", [1, 20])
def test_default_tile_sizes_give_the_same(tokens: int) -> None:
    weights = random_layer(("Q4_0", "Q8_0", "Q4_0"), 64, 96)
    assert check(TritonKernels(DEVICE), weights, tokens, [2, 1]) < 1e-6


@pytest.mark.parametrize("tokens", [1, 12])
def test_bfloat16_states(tokens: int) -> None:
    """Judged by bf16's own step (2^-8): activations and parts of the sum are rounded to it in prefill."""
    weights = random_layer(("Q4_K", "Q4_K", "Q6_K"))
    assert check(TritonKernels(DEVICE, LARGE), weights, tokens, [0, 2, 3], torch.bfloat16) < 0.01


def test_plain_twin_runs_the_same_calls() -> None:
    for kinds in (("Q4_K", "Q4_K", "Q6_K"), ("F32", "BF16", "Q8_0")):
        weights = random_layer(kinds)
        for tokens in (1, 16, 17):
            assert check(TorchKernels(), weights, tokens, [3, 1]) < 1e-6


@pytest.mark.parametrize("kind", PLANES)
def test_planes_hold_every_byte_once(kind: str) -> None:
    """The repacking kernel against numpy; 67 blocks are no whole number of its programs."""
    size = BLOCK_BYTES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (67, size), dtype=np.uint8)
    wanted = np.concatenate([raw[:, at : at + count].ravel() for at, count in PLANES[kind]])
    assert sorted(b for at, count in PLANES[kind] for b in range(at, at + count)) == list(range(size))
    part = slot_layout(random_layer((kind,) * 3).spec, split=True).gate._replace(size=raw.size)
    target = torch.zeros(raw.size, dtype=torch.uint8, device=DEVICE)
    TritonKernels(DEVICE).repack(part, torch.from_numpy(raw.ravel().copy()).to(DEVICE), target)
    np.testing.assert_array_equal(target.cpu().numpy(), wanted)


def test_what_the_kernels_refuse() -> None:
    kernels, spec = TritonKernels(DEVICE), random_layer(("Q8_0",) * 3, 256, 320).spec
    assert kernels.refusal(spec) is None
    assert "Q4_1" in str(kernels.refusal(replace(spec, up_type="Q4_1")))
    assert "320 columns" in str(kernels.refusal(replace(spec, down_type="Q6_K")))


def test_slots_start_aligned_whatever_the_types() -> None:
    for kinds, hidden, intermediate, experts, top_k in MIXED:
        spec = random_layer(kinds, hidden, intermediate, experts, top_k).spec
        layout = slot_layout(spec, split=True)
        assert all(part.offset % 256 == 0 for part in layout)
        assert layout.size % 256 == 0
        assert spec.expert_bytes <= layout.size < spec.expert_bytes + 3 * 256


def test_kernels_compile_for_a_gpu() -> None:
    """Triton compiles without a device: every type in every kernel must give sm_90 code, in wide loads."""
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("ok") == 6 * len(SUPPORTED) + 3
