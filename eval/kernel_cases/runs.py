"""Run one case of the device kernels as the product does, and compare it with a reference.

Slots are filled through the product's own repacking. The float64 reference is computed on the same
device from the stored bytes by `experts.dequant`. Memory that nobody has written reads as NaN:
slots' gaps and spare slots because they are filled with 0xFF, activations and outputs by torch's
own `fill_uninitialized_memory`.

    for case in cases(interpreted=False):
        error = run_case(case, product_kernels(case, device), device)
        assert error < case.limit
"""

from __future__ import annotations

import numpy as np
import torch

from eval.kernel_cases.cases import Case, LinearCase, RepackCase
from eval.kernel_cases.data import fill, random_call, random_matrices, random_stored
from eval.kernel_cases.reference import poisoned, reference, rms_error
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels, SlotCall
from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, Part, to_planes
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.weights.dequant import dequantize


def product_kernels(case: Case, device: torch.device) -> Kernels:
    """What the product computes these types with on a GPU.

    Those are Triton's kernels, or torch's where Triton's refuse. Cases of more than 8 tokens meet
    the prompt kernels.
    """
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    kernels = TritonKernels(device, case.blocks, decode_tokens=8)
    return TorchKernels() if kernels.refusal(case.shape.spec) else kernels


def run_case(
    case: Case,
    kernels: Kernels,
    device: torch.device,
) -> float:
    """Relative RMS error of one call; NaN if anything was read that nobody had written.

    Expert 0 has no slot, so a pair in `top_k` or fewer is not computed here, as in the product. The
    others' slots are in another order than the experts.
    """
    shape = case.shape
    seed = case.tokens
    matrices = random_matrices(shape, seed, device)
    buffer, slot_of = fill(kernels, shape, matrices, device)
    used = [slot for slot in slot_of.tolist() if slot >= 0]
    used.sort()
    hidden, ids, routing = random_call(shape, case.tokens, case.dtype, seed, device)
    routing = routing.to(case.routing)
    call = SlotCall(
        buffer,
        kernels.layout(shape.spec),
        tuple(used),
        hidden,
        slot_of[ids],
        routing,
    )
    with poisoned():
        found = kernels.down(call, kernels.gate_up(call))
    assert found.dtype == case.dtype
    assert found.shape == hidden.shape
    wanted = reference(shape, matrices, hidden, ids, routing)
    return rms_error(found, wanted)


def run_linear(case: LinearCase, device: torch.device) -> float:
    """Relative RMS error of one dense linear; NaN if an output was not written."""
    from hybrimoe_plugin.compute.gpu.kernels.linear import linear

    generator = torch.Generator(device)
    generator.manual_seed(case.tokens)
    (stored,) = random_stored(case.kind, 1, case.rows, case.columns, generator)
    # The kernel reads matrices as the product keeps them on the device: split into planes.
    planes = to_planes(stored.cpu().numpy(), case.kind)
    matrix = torch.from_numpy(planes).to(device)
    states = torch.randn(case.tokens, case.columns, generator=generator, device=device)
    states = states.to(case.dtype)
    with poisoned():
        found = linear(states, matrix, case.kind, case.rows)
    assert found.dtype == case.dtype
    weights = dequantize(stored, case.kind, (case.rows, case.columns)).double()
    return rms_error(found, states.double() @ weights.T)


def run_repack(case: RepackCase, device: torch.device) -> int:
    """Bytes that differ from numpy's own splitting, those beside the target included: 0.

    The target lies in the middle of a larger buffer, so that writes beside it are seen.
    """
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    beside = 256
    size = case.blocks * BLOCK_BYTES[case.kind]
    total = size + 2 * beside
    target = slice(beside, beside + size)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, size, dtype=np.uint8)
    room = torch.full((total,), 0xFF, dtype=torch.uint8, device=device)
    part = Part(case.kind, 1, 1, 0, size, planar=True)
    source = torch.from_numpy(raw).to(device)
    TritonKernels(device).repack(part, source, room[target])
    wanted = np.full(total, 0xFF, np.uint8)
    wanted[target] = to_planes(raw, case.kind)
    different = room.cpu().numpy() != wanted
    return int(np.count_nonzero(different))
