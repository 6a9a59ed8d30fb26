"""Fused operators replace what they are proved equal to, in every family, and nothing else."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loading import injected
from one_thread import one_torch_thread  # noqa: F401
from torch import nn
from torch.nn import functional
from transformers import AutoConfig

from eval.models.agreement import check_agreement
from eval.models.shrunk import moe_types, shrunk_model
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model
from hybrimoe_plugin.injection.inject import inject
from hybrimoe_plugin.injection.match import plan_injection
from hybrimoe_plugin.injection.rules import parse_rules
from hybrimoe_plugin.operators.attention import FusedAttention
from hybrimoe_plugin.operators.mla import FusedMLA
from hybrimoe_plugin.operators.mlp import FusedMLP
from hybrimoe_plugin.operators.norm import FusedRMSNorm
from hybrimoe_plugin.operators.proof.proofs import Proofs

RULE = """
- match: {{name: '{name}'}}
  replace:
    class: hybrimoe_plugin.operators.{operator}
    kwargs: {{dense: dequantised, prefill_device: cpu, generate_device: cpu}}
"""
ATTENTION = "(attn|attention|mixer)$"
EVERYWHERE = {
    "norm$": "norm.FusedRMSNorm",
    "(mlp|shared_[a-z]+|feed_forward)$": "mlp.FusedMLP",
    ATTENTION: "attention.FusedAttention",
}
LATENT = "mla.FusedMLA"


def inject_everywhere(model: Any) -> list[nn.Module]:
    """Name fused operators for all that is named like it; those that were put in."""
    operators = dict(EVERYWHERE)
    if hasattr(model.config.get_text_config(), "kv_lora_rank"):
        operators["attn$"] = LATENT
        del operators[ATTENTION]
    names = [name for name, _ in model.named_modules()]
    text = "".join(
        RULE.format(name=name, operator=operator)
        for name, operator in operators.items()
        if any(map(re.compile(name).search, names))
    )
    rules = parse_rules(text, "r.yaml")
    proofs = Proofs(model, model.config)
    plan = plan_injection(model, rules, declines=proofs.declines)
    return [done.operator for done in inject(model, plan, None, model.config).replaced]


@pytest.mark.parametrize("model_type", moe_types())
def test_rules_that_name_them_everywhere_change_no_logit(model_type: str) -> None:
    try:
        right = shrunk_model(model_type)
        check_agreement(right, right)
    except Exception as error:  # no tiny model of it runs in this release, of any cause
        pytest.skip(f"{type(error).__name__}: {error}")
    model = copy.deepcopy(right)
    inject_everywhere(model)
    check_agreement(model, right)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.DENSE])
def test_families_whose_rules_name_them_keep_them(family: str) -> None:
    right = tiny.model(family)
    model = copy.deepcopy(right)
    put_in = {type(operator) for operator in inject_everywhere(model)}
    assert put_in & {FusedAttention, FusedMLA} and FusedRMSNorm in put_in
    if "deepseek" in family or family in tiny.DENSE:
        assert FusedMLP in put_in
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    assert all(isinstance(norm, FusedRMSNorm) for norm in norms)
    check_agreement(model, right)


def test_one_notice_says_what_stays_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = shrunk_model("gpt_oss")
    right.save_pretrained(tmp_path)
    rules = tmp_path / "r.yaml"
    experts = RULE.format(name="mlp.experts$", operator="experts.HybriMoEExperts")
    attention = RULE.format(name="self_attn$", operator="attention.LeanAttention")
    rules.write_text(experts + attention)
    model = injected(tmp_path, rules=rules, accelerator="none")
    check_agreement(model, right)
    model.hybrimoe.close()
    (notice,) = [record.message for record in caplog.records if "FusedAtt" in record.message]
    assert notice == (
        "model.layers.0.self_attn and 3 more: FusedAttention is not used in place of "
        "GptOssAttention, which stays as it is: it does not use sinks"
    )


def test_models_of_real_size_are_proved_without_their_weights() -> None:
    """DeepSeek-V3 as it is: 61 layers, 7168 wide, 128 heads, no weights there at all."""
    model = meta_model(AutoConfig.for_model("deepseek_v3"))
    proofs = Proofs(model, model.config)
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            assert not proofs.declines(name, module, FusedMLA)
        elif name.endswith("norm"):
            assert not proofs.declines(name, module, FusedRMSNorm)
        elif name.endswith(("layers.0.mlp", "shared_experts")):
            assert not proofs.declines(name, module, FusedMLP)
    assert all(value.is_meta for value in model.parameters())


class Clamped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(x.clamp(max=7.0))


def test_what_an_epsilon_or_a_clamp_does_is_seen() -> None:
    model = tiny.model("qwen3")
    layer = model.model.layers[0]
    norm = copy.deepcopy(layer.input_layernorm)
    norm.forward = lambda x: functional.rms_norm(x, norm.weight.shape, norm.weight, 1e-5)
    mlp = copy.deepcopy(layer.mlp)
    mlp.act_fn = Clamped()
    proofs = Proofs(model, model.config)
    assert proofs.declines("a", norm, FusedRMSNorm) and proofs.declines("b", mlp, FusedMLP)
    assert not proofs.declines("c", layer.mlp, FusedMLP)


@pytest.mark.parametrize("change", ["scaling", "rope", "bias"])
def test_attention_that_differs_in_one_thing_stays(change: str) -> None:
    model = tiny.model("qwen2_moe")
    attention = model.model.layers[1].self_attn
    forward = type(attention).forward

    def changed(self: Any, hidden_states: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        if change == "rope":
            cos, sin = position_embeddings
            position_embeddings = cos, -sin
        if change == "scaling":
            self.scaling *= 1.001
        out, none = forward(self, hidden_states, position_embeddings, **kwargs)
        return (out + 1e-3 if change == "bias" else out), none

    kind = type("Changed", (type(attention),), {"forward": changed})
    attention.__class__ = kind
    proofs = Proofs(model, model.config)
    name = "model.layers.{}.self_attn"
    assert proofs.declines(name.format(1), attention, FusedAttention)
    other = model.model.layers[0].self_attn
    assert not proofs.declines(name.format(0), other, FusedAttention)
