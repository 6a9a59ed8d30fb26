"""Layers of every family by what their code is shown to do: steps, and a prompt's last tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from graphed import greedy, layers_of
from loading import injected
from one_thread import one_torch_thread  # noqa: F401
from replayed import Replayed
from torch import nn

from eval.models.agreement import check_agreement
from eval.models.shrunk import moe_types, shrunk_model
from hybrimoe_plugin.decode import connect
from hybrimoe_plugin.decode.connect import connect_layers
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.decode.last_tokens import LastTokens
from hybrimoe_plugin.decode.on_cpu.cpu_step import CpuStep
from hybrimoe_plugin.decode.proof.block_glue import BlockGlue, block_of
from hybrimoe_plugin.decode.proof.layer_glue import LayerGlue, glue_of
from hybrimoe_plugin.engine.turns import Turns
from hybrimoe_plugin.injection.inject import inject
from hybrimoe_plugin.injection.match import plan_injection
from hybrimoe_plugin.injection.rules import parse_rules
from hybrimoe_plugin.operators.proof.proofs import Proofs

RULES = r"""
- match: {name: '\.layers\.\d+$'}
  replace:
    class: hybrimoe_plugin.decode.graphed_layer.GraphedLayer
    kwargs: {prefill_device: cpu, generate_device: cpu}
"""
WITHOUT = {
    "axk2", "deepseek_v4", "gemma4", "gemma4_text", "glm_moe_dsa", "hy_v4", "inkling2_loop_text",
    "inkling2_text", "inkling_text", "llama4", "llama4_text", "longcat_flash", "nemotron_h",
    "qwen4_exp", "qwen4_exp_text", "zaya",
}  # fmt: skip
"""Types whose last layer is computed for the whole prompt."""


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each call of `LastTokens` has kept."""
    found: list[int] = []
    call = LastTokens.__call__

    def note(self: LastTokens, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output = call(self, hidden, **kwargs)
        found.append(output.shape[1])
        return output

    monkeypatch.setattr(LastTokens, "__call__", note)
    return found


def connected(model: Any) -> Any:
    """Replace all layers that can be by `GraphedLayer`, and connect them."""
    proofs = Proofs(model, model.config)
    plan = plan_injection(model, parse_rules(RULES, "r.yaml"), declines=proofs.declines)
    inject(model, plan, None, model.config)
    connect_layers(model, Turns())
    return model


@pytest.mark.parametrize("model_type", moe_types())
@torch.no_grad()
def test_last_tokens_have_the_plain_logits(model_type: str, kept: list[int]) -> None:
    try:
        right = shrunk_model(model_type)
        check_agreement(right, right)
    except Exception as error:  # no tiny model of it runs in this release, of any cause
        pytest.skip(f"{type(error).__name__}: {error}")
    model = connected(copy.deepcopy(right))
    check_agreement(model, right)
    assert not kept
    prompt = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3))
    for keep in (1, 3):
        wanted = right(prompt).logits[:, -keep:]
        found = model(prompt, logits_to_keep=keep, use_cache=False).logits
        torch.testing.assert_close(found, wanted)
    if model_type != "aria_text":  # older releases of transformers have a block of another form
        assert kept == ([] if model_type in WITHOUT else [1, 3])


def test_what_is_no_layer_stays() -> None:
    model = shrunk_model("mixtral")
    proofs = Proofs(model, model.config)
    for name in ("model.norm", "model.layers.0.self_attn", "lm_head"):
        assert proofs.declines(name, model.get_submodule(name), GraphedLayer)
    assert not proofs.declines("model.layers.0", model.model.layers[0], GraphedLayer)


class Layer(nn.Module):
    """A layer that looks like any other and does one thing differently."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.factor = 0.5
        self.norm = nn.LayerNorm(8)
        self.attention = nn.Linear(8, 8)
        self.second = nn.LayerNorm(8)
        self.feed = nn.Linear(8, 8)

    def forward(self, hidden_states: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        change = self.change
        normed = self.norm(hidden_states)
        mixed = self.attention(normed, position_embeddings, **kwargs)
        if change == "scaled":
            mixed = mixed * self.factor
        if change == "other mask":
            mixed = self.attention(normed, position_embeddings, attention_mask=None)
        total = hidden_states + mixed
        fed = self.feed(self.second(total))
        if change == "normed residual":
            total = self.second(total)
        if change == "clamped":
            fed = fed.clamp(max=0.5)
        if change == "mean":
            fed = fed - fed.mean(dim=1, keepdim=True)
        return total + fed


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("", LayerGlue("norm", "attention", "second", "feed")),
        ("scaled", LayerGlue("norm", "attention", "second", "feed", 0.5)),
        ("other mask", None),
        ("normed residual", None),
        ("clamped", None),
        ("mean", None),
    ],
)
def test_a_layer_is_what_its_code_does(change: str, wanted: LayerGlue | None) -> None:
    with torch.device("meta"):
        layer = Layer(change)
    assert glue_of(layer) == wanted


class Block(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.gate = self.experts = self.shared_experts = None  # type: ignore[assignment]
        for name in ("gate", "experts", "shared_experts"):
            setattr(self, name, nn.Linear(16, 16))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, 16)
        _, weights, ids = self.gate(flat)
        routed = self.experts(flat, ids, weights)
        if self.change == "scaled":
            routed = routed * 1.1
        if self.change == "weights":
            routed = self.experts(flat, ids, weights * 2)
        if self.change != "no shared":
            routed = routed + self.shared_experts(flat)
        return routed.view(hidden_states.shape)


@pytest.mark.parametrize("change", ["", "scaled", "weights", "no shared"])
def test_a_block_is_what_its_code_does(change: str) -> None:
    wanted = None if change else BlockGlue("gate", "shared_experts", None)
    assert block_of(Block(change)) == wanted


STEPPED: dict[str, tuple[int, dict[str, Any]]] = {
    # Model type -> layers whose steps are graphs, and what is changed in its config.
    "axk1": (4, {}),  # its block of experts is called as a module
    "dots1": (4, {}),
    "exaone_moe": (2, {"sliding_window": 64}),  # two have no positions
    "glm4_moe": (0, {}),  # half of a head is rotated
    "glm4_moe_lite": (4, {}),
    "gpt_oss": (0, {}),  # sinks
    "granitemoe": (4, {"residual_multiplier": 0.22, "attention_multiplier": 0.1}),
    "qwen3_5_moe_text": (0, {}),  # gated delta-net layers, and gates of attention's output
}


@pytest.mark.parametrize("model_type", STEPPED)
def test_steps_of_any_family_have_the_plain_logits(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.kt_kernel()
    if model_type not in moe_types():
        pytest.skip("this transformers has no such type")
    count, changes = STEPPED[model_type]
    right = shrunk_model(model_type, **changes)
    right.save_pretrained(tmp_path)
    model = injected(tmp_path, cpu_backend="auto", accelerator="none")
    steps: list[CpuStep] = []
    call = CpuStep.__call__

    def note(self: CpuStep, *args: Any) -> torch.Tensor:
        steps.append(self)
        return call(self, *args)

    monkeypatch.setattr(CpuStep, "__call__", note)
    check_agreement(model, right, rtol=1e-3, atol=1e-4)  # kernels sum in another order
    assert len(steps) == 4 * count and len(set(steps)) == count
    assert all(type(layer) is GraphedLayer for layer in model.model.layers)
    model.hybrimoe.close()


@pytest.mark.parametrize("model_type", ["dots1", "granitemoe", "glm4_moe_lite", "gpt_oss"])
def test_graphs_of_any_family_are_proved_or_left(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for CUDA graphs; gpt-oss has attention of its own, which is not captured."""
    if model_type not in moe_types():
        pytest.skip("this transformers has no such type")
    capture = Replayed()
    monkeypatch.setattr(connect, "capture_for", lambda device: capture)
    right = shrunk_model(model_type)
    right.save_pretrained(tmp_path)
    model = injected(tmp_path, accelerator="emulated", cache_ratio=0.5, dense="dequantised")
    prompt = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(3))
    assert greedy(model, prompt, 12) == greedy(right, prompt, 12)
    served = [layer.captured for layer in layers_of(model)]
    assert served == [model_type != "gpt_oss"] * 4
    model.hybrimoe.close()
