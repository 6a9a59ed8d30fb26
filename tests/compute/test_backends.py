"""CPU backends and slot accelerator against a float32 reference; odd shapes, masks,
refused types.
"""

from __future__ import annotations

import logging
import subprocess
import sys

import needs
import numpy as np
import pytest
import tiny_experts
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as reference_dequantize

from hybrimoe_plugin.compute.backends import CPUBackend
from hybrimoe_plugin.compute.cpu.kt_experts import KTExperts
from hybrimoe_plugin.compute.cpu.kt_kernel import kernel_types
from hybrimoe_plugin.compute.cpu.requantise import supported_weights
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.dequant import dequantize, supported
from hybrimoe_plugin.weights.layer_weights import LayerWeights

needs.kt_kernel()

# Relative RMS error of kt-kernel against float32 on the same dequantised weights, from 8-bit
# activations (bf16 for float types): measured at 0.011 to 0.015, with half as much again for small
# shapes.
TOLERANCE = {
    "Q8_0": 0.02,
    "Q4_0": 0.02,
    "Q5_0": 0.02,
    "F16": 0.01,
    "BF16": 0.01,
    "F32": 0.01,
    "Q4_1": 0.025,
}


def call(
    tokens: int, experts: int = 8, hidden: int = 64, top_k: int = 2, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return (
        torch.randn(tokens, hidden, generator=generator),
        ids,
        torch.rand(tokens, top_k, generator=generator),
    )


def compute(
    backend: CPUBackend, arguments: tuple[torch.Tensor, ...], mine: list[int], layer: int = 0
) -> torch.Tensor:
    backend.submit(layer, *arguments, mine)  # type: ignore[arg-type]
    return backend.sync()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm().clamp_min(1e-9))


def both(weights: LayerWeights) -> tuple[KTExperts, TorchExperts]:
    native = KTExperts(1)
    plain = TorchExperts(keep=True)
    native.add_layer(weights)
    plain.add_layer(weights)
    return native, plain


@pytest.mark.parametrize(
    "types", [("Q8_0",) * 3, ("Q4_0", "Q4_0", "Q8_0"), ("Q5_0",) * 3, ("F16",) * 3, ("BF16",) * 3]
)
@pytest.mark.parametrize("hidden", [64, 256, 320])
def test_kt_kernel_equals_the_reference(types: tuple[str, str, str], hidden: int) -> None:
    native, plain = both(tiny_experts.layer(hidden=hidden, types=types))
    for tokens in (1, 3, 9, 10, 33, 130):
        arguments = call(tokens, hidden=hidden, seed=tokens)
        for mine in (list(range(8)), [0, 3, 5, 6]):
            wanted = compute(plain, arguments, mine)
            assert error(compute(native, arguments, mine), wanted) < max(
                TOLERANCE[name] for name in types
            )
    native.close()


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "F16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kt_kernel_loses_no_nan(type_name: str, bad: float) -> None:
    """Its products round activations to integers, a NaN to any number; it must spread as in
    float32, no further.
    """
    native, plain = both(tiny_experts.layer(types=(type_name,) * 3))
    for tokens in (1, 3, 20):
        hidden, *chosen = call(tokens)
        hidden[tokens // 2, 5] = bad
        found, wanted = (
            compute(backend, (hidden, *chosen), list(range(8))).isnan()
            for backend in (native, plain)
        )
        assert torch.equal(found, wanted)
        assert found.any()


def test_kt_kernel_never_gets_bfloat16_where_its_build_cannot_multiply_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such a build ends the process at the first token."""
    caplog.set_level(logging.INFO)
    weights = tiny_experts.layer(types=("BF16", "Q8_0", "F32"))
    assert "BF16" in kernel_types("amx")
    assert "BF16" in kernel_types("avx512_bf16")
    for variant in ("avx2", "avx512_vnni", "a later one", ""):
        found = supported_weights(weights, kernel_types(variant))
        assert [matrix.type_name for matrix in found.matrices()] == ["F16", "Q8_0", "F16"]
        assert found.gate.experts[0].size == found.spec.gate_bytes
        for one, other in zip(found.dequantized(3), weights.dequantized(3), strict=True):
            torch.testing.assert_close(
                one, other, rtol=2**-11, atol=2**-24
            )  # a bfloat16 fits into 11 bits
    assert "requantised to F16" in caplog.text
    weights.gate.experts[0].view(np.uint16)[0] = 0x7F00  # 1.7e38
    with pytest.raises(BackendError, match="beyond the range"):
        supported_weights(weights, kernel_types("avx2"))


def test_kt_kernel_in_pieces_of_its_largest_call() -> None:
    native, plain = both(tiny_experts.layer(types=("Q8_0",) * 3))
    arguments = call(2100)
    assert (
        error(compute(native, arguments, list(range(8))), compute(plain, arguments, list(range(8))))
        < 0.02
    )
    native.close()


def test_kt_kernel_two_layers_two_backends_and_no_expert() -> None:
    layers = [tiny_experts.layer(types=("Q8_0",) * 3, index=index) for index in range(2)]
    first = KTExperts(1)
    second = KTExperts(1)
    plain = TorchExperts(keep=True)
    for backend in (first, second, plain):
        for weights in layers:
            backend.add_layer(weights)
    arguments = call(3)
    for layer in (1, 0):
        wanted = compute(plain, arguments, [1, 2, 4, 7], layer)
        for backend in (first, second):
            assert error(compute(backend, arguments, [1, 2, 4, 7], layer), wanted) < 0.02
    assert not compute(first, arguments, []).any()
    first.close()
    second.close()


@pytest.mark.parametrize("types", [("F32",) * 3, ("Q4_1", "Q4_1", "Q8_0")])
def test_types_without_a_kernel_are_requantised_with_a_notice(
    types: tuple[str, str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # whoever loads a model says it once for all layers
    native, plain = both(tiny_experts.layer(types=types))
    assert "requantised" in caplog.text
    arguments = call(5)
    wanted = compute(plain, arguments, list(range(8)))
    assert error(compute(native, arguments, list(range(8))), wanted) < TOLERANCE[types[0]]
    native.close()


def test_kt_kernel_refuses_what_would_end_the_process() -> None:
    native, _ = both(tiny_experts.layer(types=("Q8_0",) * 3))
    hidden, ids, weights = call(2)
    for bad in (
        (hidden[:, :32], ids, weights),
        (hidden.long(), ids, weights),
        (hidden, ids + 8, weights),
        (hidden, ids - 8, weights),
        (hidden, ids[:1], weights),
        (hidden, torch.cat([ids, ids], 1), torch.cat([weights, weights], 1)),
    ):
        with pytest.raises(BackendError):
            native.submit(0, *bad, [0])
    with pytest.raises(BackendError, match="multiple of 256"):
        native.add_layer(tiny_experts.layer(intermediate=128, types=("Q8_0",) * 3))
    native.close()


def test_kernel_greetings_stay_out_of_standard_output() -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests/helpers/models')\n"
        "import tiny_experts\nfrom hybrimoe_plugin.compute.cpu.kt_experts import KTExperts\n"
        "print('before'); k = KTExperts(1); k.add_layer(tiny_experts.layer(types=('Q8_0',) * 3)); "
        "k.close()\n"
        "print('after')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["before", "after"]


def test_loading_the_kernels_leaves_arithmetic_alone() -> None:
    """Their library is built with -ffast-math, whose start-up code makes subnormal numbers 0 in the
    loading thread.
    """
    program = (
        "from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel\n"
        "import_kernel()\n"
        "tiny = 5e-324\n"
        "assert tiny * 1.0 > 0, 'subnormal numbers are flushed'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("type_name", supported())
def test_device_dequantisation_is_exact(type_name: str) -> None:
    if type_name not in GGMLQuantizationType.__members__:
        pytest.skip("an older gguf package")
    kind = GGMLQuantizationType[type_name]
    block, size = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(
        0, 256, (32, size * max(1, 256 // block)), dtype=np.uint8
    )
    with np.errstate(all="ignore"):  # random scales are sometimes not finite
        wanted = reference_dequantize(raw, kind)
    found = dequantize(torch.from_numpy(raw.ravel()), type_name, wanted.shape).numpy()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_slots_compute_their_experts(tokens: int) -> None:
    weights = tiny_experts.layer(types=("Q8_0", "Q4_0", "F16"))
    plain = TorchExperts(keep=True)
    plain.add_layer(weights)
    accelerator = make_accelerator("emulated", torch.device("cpu"))
    assert accelerator is not None
    accelerator.allocate(3, [weights])
    for slot, expert in enumerate((6, 1, 4)):
        accelerator.onload(slot, weights, expert)
    hidden, ids, routing = call(tokens)
    table = torch.full((8,), -1)
    table[torch.tensor([6, 1, 4])] = torch.arange(3)
    found = accelerator.compute((0, 1, 2), hidden, table[ids], routing)
    torch.testing.assert_close(found, compute(plain, (hidden, ids, routing), [1, 4, 6]))
    with pytest.raises(BackendError, match="never onloaded"):
        accelerator.allocate(4, [weights])
        accelerator.compute((3,), hidden, table[ids], routing)


def test_cuda_is_refused_with_the_reason_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(BackendError, match="CUDA"):
        make_accelerator("cuda", torch.device("cuda:0"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_slots_equal_the_reference() -> None:
    weights = tiny_experts.layer(types=("Q8_0", "Q4_0", "F16"))
    plain = TorchExperts(keep=True)
    plain.add_layer(weights)
    accelerator = make_accelerator("cuda", torch.device("cuda:0"))
    assert accelerator is not None
    accelerator.allocate(2, [weights])
    hidden, ids, routing = call(33)
    for expert in range(8):  # slots are reused while computes are queued
        accelerator.onload(expert % 2, weights, expert)
        slot_ids = torch.where(ids == expert, expert % 2, -1).cuda()
        found = accelerator.compute((expert % 2,), hidden.cuda(), slot_ids, routing.cuda())
        torch.testing.assert_close(
            found.cpu(), compute(plain, (hidden, ids, routing), [expert]), rtol=1e-4, atol=1e-4
        )
    accelerator.close()
