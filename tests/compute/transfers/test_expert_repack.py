"""All matrices of an expert are rearranged in one launch; later launches skip Triton's search."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, PLANES, Part, to_planes

pytest.importorskip("triton")
from hybrimoe_plugin.compute.gpu.kernels.repack import part_shape
from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).resolve().parents[3]
POISON = 0xA5


def settle() -> None:
    """Let a card finish."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def check(kinds: tuple[str, ...], blocks: tuple[int, ...]) -> None:
    """Twice into different slots: every byte in its plane, and none written beside."""
    parts = []
    offset = 256
    for kind, count in zip(kinds, blocks, strict=True):
        size = count * BLOCK_BYTES[kind]
        parts.append(Part(kind, 1, 1, offset, size, planar=True))
        offset += -(-size // 256) * 256 + 256
    rng = np.random.default_rng(0)
    room = torch.full((2, offset), POISON, dtype=torch.uint8, device=DEVICE)
    repack = TritonKernels(DEVICE).repacker(tuple(parts))
    stream = torch.cuda.Stream(DEVICE) if DEVICE.type == "cuda" else None
    for slot in room:
        wanted = np.full(offset, POISON, np.uint8)
        arrived = []
        for part in parts:
            raw = rng.integers(0, 256, part.size + 64, dtype=np.uint8)  # the buffer is longer
            arrived.append(torch.from_numpy(raw).to(DEVICE))
            wanted[part.span] = to_planes(raw[: part.size], part.type_name)
        settle()
        repack(arrived, slot, stream.cuda_stream if stream else 0)
        settle()
        np.testing.assert_array_equal(slot.cpu().numpy(), wanted)


@pytest.mark.parametrize("kind", sorted(PLANES))
def test_every_type_and_a_last_program_that_is_not_full(kind: str) -> None:
    check((kind,) * 3, (33, 64, 7))


@pytest.mark.parametrize(
    "kinds", [("Q6_K",), ("Q8_0", "MXFP4"), ("MXFP4", "Q6_K", "Q4_0"), ("Q3_K", "Q5_0", "IQ4_NL")]
)
def test_types_and_sizes_may_differ(kinds: tuple[str, ...]) -> None:
    check(kinds, (65, 1, 32)[: len(kinds)])


def test_a_part_is_described_in_words_that_its_blocks_are_made_of() -> None:
    """Planes of odd blocks are written byte by byte, others by twos."""
    for kind, size in BLOCK_BYTES.items():
        word, offset, blocks, words, _, lengths = part_shape(Part(kind, 1, 1, 512, 8 * size, True))
        assert (word == 1) == (size % 2 == 1)
        assert (offset, blocks, words * word, sum(lengths) * word) == (512, 8, size, size)


PREPARED = """
import contextlib, torch, triton
from eval.kernel_prebuild.driver import Count, make_driver
from eval.kernel_prebuild.launch import CARD, PretendCard
from triton.runtime import driver

launched, entered = [], []

class Recorder:
    def __init__(self, src, metadata):
        pass
    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        launched.append(((x, y, z), stream, args))

card = make_driver(90, None, Count())
card.launcher_cls = Recorder
card.get_current_stream = lambda device=0: 5
driver.set_active(card)
torch.cuda.ExternalStream = lambda handle, device: handle
@contextlib.contextmanager
def inside(stream):
    entered.append(stream)
    yield
torch.cuda.stream = inside

from hybrimoe_plugin.compute.gpu.kernels.layout import Part
from hybrimoe_plugin.compute.gpu.kernels.repack import ExpertRepacker
parts = (Part("Q6_K", 8, 256, 0, 8 * 210, True), Part("Q8_0", 8, 32, 2048, 8 * 34, True))
repack = ExpertRepacker(parts)
with PretendCard():
    for _ in range(3):
        arrived = [torch.empty(2048, dtype=torch.uint8) for _ in parts]
        slot = torch.empty(4096, dtype=torch.uint8)
        repack(arrived, slot, 7)
    shifted = torch.empty(4096, dtype=torch.uint8)[1:]
    repack(arrived, shifted, 7)
first, second, third, odd = launched
assert entered == [7, 7], entered  # only what goes through Triton's own launch
assert second[:2] == third[:2] == ((1, 2, 1), 7), second
assert first[0] == second[0] and first[2][4:] == second[2][4:], (first, second)
found = [arrived[0], arrived[1], slot, slot]
assert list(third[2][:4]) == [tensor.data_ptr() for tensor in found]
assert not isinstance(odd[2][3], int), "not aligned: Triton finds the kernel for that"
print("prepared")
"""


def test_a_prepared_launch_passes_what_tritons_own_does() -> None:
    """Compiled for a card that is not there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PREPARED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split()[-1:] == ["prepared"], done.stdout + done.stderr
