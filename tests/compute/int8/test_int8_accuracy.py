"""What docs/formats.md says of the error that int8 activations make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.kernel_cases.data import fill, random_call, random_matrices
from eval.kernel_cases.reference import reference, rms_error
from eval.kernel_cases.shapes import TYPES, Shape
from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.formats.description import FORMATS, INTEGERS
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[3] / "docs" / "formats.md"
TOKENS = 2


def balance(stored: torch.Tensor, kind: str) -> None:
    """Choose minima such that weights have a mean of 0, as a model's have.

    Mutates: stored [experts, bytes].
    """
    form = FORMATS[kind]
    blocks = stored.view(-1, form.block_bytes)
    for name, sign in (("dmin", 1), ("m", -1)):
        if name in dict(form.fields):
            mean = {"Q2_K": 1.5, "Q4_K": 7.5, "Q4_1": 7.5, "Q5_K": 15.5, "Q5_1": 15.5}[kind]
            d = form.offset("d")
            scales = blocks[:, d : d + 2].clone().view(torch.float16).float()
            at = form.offset(name)
            blocks[:, at : at + 2] = (sign * mean * scales).half().view(torch.uint8)


def error(shape: Shape, int8: bool) -> float:
    """Relative RMS error of a layer's output against float64, with float32 sums."""
    kernels = TorchKernels(int8=int8)
    matrices = random_matrices(shape, 7, CPU)
    for matrix, kind in zip(matrices, shape.kinds, strict=True):
        balance(matrix, kind)
    buffer, slot_of = fill(kernels, shape, matrices, CPU)
    hidden, ids, routing = random_call(shape, TOKENS, torch.float32, 7, CPU)
    used = tuple(slot for slot in slot_of.tolist() if slot >= 0)
    call = SlotCall(buffer, kernels.layout(shape.spec), used, hidden, slot_of[ids], routing)
    found = kernels.down(call, kernels.gate_up(call))
    return rms_error(found, reference(shape, matrices, hidden, ids, routing))


def stated() -> dict[str, tuple[float, float]]:
    """Type -> (float, int8) of the page's table."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0] in INTEGERS and cells[2].endswith(" %"):
            found[cells[0]] = (float(cells[1]), float(cells[2].removesuffix(" %")) / 100)
    return found


def test_the_page_has_every_type() -> None:
    assert set(stated()) == set(INTEGERS)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind in INTEGERS])
def test_errors_are_those_of_the_page(kind: str) -> None:
    shape = Shape("Qwen3-30B-A3B", (kind,) * 3, 2048, 768, 3, 2)
    floats, int8 = error(shape, int8=False), error(shape, int8=True)
    line = f"| {kind} | {floats:.0e} | {100 * int8:.2f} % |"
    said_floats, said_int8 = stated().get(kind, (0.0, 0.0))
    # Rounding alone: one processor leaves twice as much as another.
    assert floats < 1e-6, line
    assert said_floats / 4 < floats < 4 * said_floats, line
    assert said_int8 == pytest.approx(int8, rel=0.02), line
