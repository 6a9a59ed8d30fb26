"""Experts of every form, in all places that compute them, against transformers' own module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from torch import nn

from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.cpu.kt_experts import refusal
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.errors import BackendError, WeightsError
from hybrimoe_plugin.operators.expert_form import read_form
from hybrimoe_plugin.weights.expert_form import ExpertForm
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.layer_weights import LayerWeights, layer_weights

TOP_K = 2
FORMS = ("mixtral", "gpt_oss", "gemma4_text", "deepseek_v4")
TOKENS = (1, 3, 40)
"""One token, few rows for each expert, and many: each takes another graph and another kernel."""


def experts_of(model_type: str) -> Any:
    """The first routed experts of a tiny model."""
    model = shrunk_model(model_type)
    found = [
        module
        for name, module in model.named_modules()
        if name.endswith(".experts") and hasattr(module, "has_gate")
    ]
    return found[0]


def write(path: Path, module: Any, form: ExpertForm, fused: bool, kind: str = "F32") -> None:
    """The module's experts in a file's layout: gate before up, rows of outputs."""
    writer = GGUFWriter(str(path), "llama")
    both, down = module.gate_up_proj.detach(), module.down_proj.detach()
    if module.is_transposed:
        both, down = both.transpose(1, 2), down.transpose(1, 2)
    gate, up = halves(module, both, 1)
    matrices = {"down": down}
    matrices |= {"gate_up": torch.cat((gate, up), dim=1)} if fused else {"gate": gate, "up": up}
    for name, value in matrices.items():
        stored = GGMLQuantizationType[kind]
        packed = quantize(value.contiguous().numpy(), stored)
        writer.add_tensor(f"blk.0.ffn_{name}_exps.weight", packed, raw_dtype=stored)
    if form.has_biases:
        gate_bias, up_bias = halves(module, module.gate_up_proj_bias.detach(), 1)
        for name, value in (
            ("gate", gate_bias),
            ("up", up_bias),
            ("down", module.down_proj_bias.detach()),
        ):
            writer.add_tensor(f"blk.0.ffn_{name}_exps.bias", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def halves(module: Any, packed: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    if module.is_concatenated:
        gate, up = packed.chunk(2, dim=dim)
        return gate, up
    return packed[:, ::2], packed[:, 1::2]


def load(path: Path, form: ExpertForm) -> LayerWeights:
    return layer_weights(
        GGUFStore.open(path),
        0,
        experts=form.experts,
        hidden=form.hidden,
        intermediate=form.intermediate,
        top_k=TOP_K,
        activation=form.activation,
        has_biases=form.has_biases,
    )


def call(form: ExpertForm, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [T, H], ids [T, K], weights [T, K]); large enough to be clamped."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = 4 * torch.randn(tokens, form.hidden, generator=generator)
    scores = torch.rand(tokens, form.experts, generator=generator)
    weights, ids = scores.topk(TOP_K)
    return hidden, ids, weights


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", FORMS)
def test_every_place_computes_the_form(model_type: str, fused: bool, tmp_path: Path) -> None:
    module = experts_of(model_type)
    form = read_form("layers.0.experts", module)
    write(tmp_path / "experts.gguf", module, form, fused)
    weights = load(tmp_path / "experts.gguf", form)
    backends = [TorchExperts(), GgmlExperts(1)]
    for backend in backends:
        backend.add_layer(weights)
    for tokens in TOKENS:
        hidden, ids, shares = call(form, tokens)
        with torch.no_grad():
            wanted = module(hidden, ids, shares)
        for backend in backends:
            backend.submit(0, hidden, ids, shares, range(form.experts))
            torch.testing.assert_close(backend.sync(), wanted, rtol=1e-4, atol=1e-4)
        found = backends[1].compute(0, hidden, ids, shares)  # type: ignore[attr-defined]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        found = in_slots(TorchKernels(), weights, hidden, ids, shares)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for backend in backends:
        backend.close()


@pytest.mark.parametrize("model_type", FORMS)
def test_triton_kernels_compute_the_form(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    module = experts_of(model_type)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    form = read_form("layers.0.experts", module)
    write(tmp_path / "experts.gguf", module, form, fused=False, kind="BF16")
    weights = load(tmp_path / "experts.gguf", form)
    device = torch.device("cpu")
    for tokens in (1, 20):
        hidden, ids, shares = call(form, tokens)
        with torch.no_grad():
            wanted = module(hidden, ids, shares)
        found = in_slots(TritonKernels(device), weights, hidden, ids, shares)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", FORMS)
def test_int8_kernels_compute_the_form(model_type: str, tmp_path: Path) -> None:
    """As the torch kernels do that see activations in int8."""
    pytest.importorskip("triton")
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    module = experts_of(model_type)
    form = read_form("layers.0.experts", module)
    write(tmp_path / "experts.gguf", module, form, fused=False, kind="Q8_0")
    weights = load(tmp_path / "experts.gguf", form)
    kernels = TritonKernels(torch.device("cpu"), activations="int8")
    hidden, ids, shares = call(form, 2)
    found = in_slots(kernels, weights, hidden, ids, shares)
    wanted = in_slots(TorchKernels(int8=True), weights, hidden, ids, shares)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def in_slots(
    kernels: Any,
    weights: LayerWeights,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    """The call with every expert in the slot of its own number."""
    accelerator = SlotAccelerator(torch.device("cpu"), "emulated", kernels)
    count = weights.spec.experts
    accelerator.allocate(count, [weights])
    for expert in range(count):
        accelerator.onload(expert, weights, expert)
    used = ids.unique().tolist()
    result = accelerator.compute(used, hidden, ids, shares)
    assert not accelerator.wrong_slots({expert: (weights, expert) for expert in range(count)})
    accelerator.close()
    return result


def test_kt_kernel_refuses_other_forms_than_its_own(tmp_path: Path) -> None:
    module = experts_of("gpt_oss")
    form = read_form("layers.0.experts", module)
    write(tmp_path / "experts.gguf", module, form, fused=False)
    assert "SwiGLU" in str(refusal(load(tmp_path / "experts.gguf", form).spec))


def test_biases_that_the_model_does_not_add_are_refused(tmp_path: Path) -> None:
    module = experts_of("gpt_oss")
    form = read_form("layers.0.experts", module)
    write(tmp_path / "experts.gguf", module, form, fused=False)
    with pytest.raises(WeightsError, match="no biases"):
        load(tmp_path / "experts.gguf", form._replace(has_biases=False))


def test_biases_of_gate_and_up_in_one_tensor_are_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "experts.gguf"
    writer = GGUFWriter(str(path), "llama")
    for part, shape in (("gate", (2, 64, 32)), ("up", (2, 64, 32)), ("down", (2, 32, 64))):
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", np.zeros(shape, np.float32))
    writer.add_tensor("blk.0.ffn_gate_up_exps.bias", np.ones((2, 128), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightsError, match="no biases"):
        load(path, ExpertForm(2, 32, 64))


def test_experts_of_a_form_that_we_do_not_compute_are_refused_by_name() -> None:
    module = experts_of("mixtral")

    class Swish(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(1.1 * x)

    module.act_fn = Swish()
    with pytest.raises(BackendError, match=r"MixtralExperts .* activation is none of silu"):
        read_form("layers.0.experts", module)
    module.has_gate = False
    with pytest.raises(BackendError, match="MixtralExperts .* no gate"):
        read_form("layers.0.experts", module)


@pytest.mark.parametrize("limit", [12.0, 100.0, 40000.0])
def test_a_clamp_is_found_wherever_it_is(limit: float) -> None:
    module = experts_of("deepseek_v4")
    module.limit = limit
    assert read_form("layers.0.experts", module).activation.limit == limit

    def clamped(packed: torch.Tensor) -> torch.Tensor:
        gate, up = packed.clamp(max=limit).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    del module.limit
    module._apply_gate = clamped
    with pytest.raises(BackendError, match="activation is none of"):
        read_form("layers.0.experts", module)


def test_experts_that_lie_evenly_in_the_file_are_not_copied(tmp_path: Path) -> None:
    module = experts_of("mixtral")
    form = read_form("layers.0.experts", module)
    writer = GGUFWriter(str(tmp_path / "experts.gguf"), "llama")
    gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
    for part, values in (("gate", gate), ("up", up), ("down", module.down_proj.detach())):
        for expert, matrix in enumerate(values):
            writer.add_tensor(f"blk.0.ffn_{part}.{expert}.weight", matrix.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = load(tmp_path / "experts.gguf", form)
    assert weights.up.stacked is not None
    assert np.shares_memory(weights.up.stacked, weights.up.experts[3])
