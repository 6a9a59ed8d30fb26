"""Layers on several devices: who goes where, that states follow, and that hooks come off again."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from hybrimoe_plugin.hosts.transformers import devices
from hybrimoe_plugin.hosts.transformers.devices import layer_devices, moved, spread
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model
from hybrimoe_plugin.injection.match import plan_injection
from hybrimoe_plugin.injection.rules import load_rules

RULES = Path(__file__).parents[3] / "optimize_rules" / "multi-gpu"


def model(layers: int = 3) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return MixtralForCausalLM(config).eval()


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where modules were moved, on a machine that has none of these devices."""
    seen: list[str] = []

    def to(module: nn.Module, device: str) -> nn.Module:
        seen.append(f"{type(module).__name__}: {device}")
        return module

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(devices, "moved", lambda value, bring: value)
    return seen


def hooks(whole: nn.Module) -> int:
    """Hooks on the model and the modules in it."""
    count = 0
    for module in whole.modules():
        count += len(module._forward_pre_hooks)
        count += len(module._forward_hooks)
    return count


def test_layers_lie_with_their_experts(placed: list[str]) -> None:
    whole = model()
    ids = torch.tensor([[1, 2, 3]])
    wanted = whole(ids).logits
    before = hooks(whole)
    # Layer 0 has no experts operator: it goes with the next one that has.
    places = {
        "model.layers.1.mlp.experts": "cuda:0",
        "model.layers.2.mlp.experts": "cuda:1",
    }
    undo = spread(whole, places)
    layers = [entry for entry in placed if entry.startswith("MixtralDecoderLayer")]
    assert layers == [
        "MixtralDecoderLayer: cuda:0",
        "MixtralDecoderLayer: cuda:0",
        "MixtralDecoderLayer: cuda:1",
    ]
    assert "Embedding: cuda:0" in placed
    assert placed[-2:] == ["MixtralRMSNorm: cuda:1", "Linear: cuda:1"]
    torch.testing.assert_close(whole(ids).logits, wanted)
    undo()
    assert hooks(whole) == before


def test_tensors_in_tuples_lists_and_dicts_are_moved() -> None:
    value = {"a": (torch.ones(2), [torch.ones(1), 3]), "b": None, "c": "text"}
    found = moved(value, lambda tensor: tensor.to("meta"))
    first, (second, number) = found["a"]
    assert first.is_meta
    assert second.is_meta
    assert number == 3
    assert found["b"] is None
    assert found["c"] == "text"


def test_layer_of_an_operator() -> None:
    assert layer_devices({"model.layers.12.mlp.experts": "cuda:1"}) == {"model.layers.12": "cuda:1"}
    assert layer_devices({"model.language_model.layers.0.mlp.experts": "x"}) == {
        "model.language_model.layers.0": "x"
    }


@pytest.mark.parametrize(
    ("name", "family", "layers", "split"),
    [("Mixtral-2-gpus", "mixtral", 32, 16), ("Qwen3-MoE-2-gpus", "qwen3_moe", 48, 32)],
)
def test_rules_for_two_devices_cover_every_layer_once(
    name: str, family: str, layers: int, split: int
) -> None:
    whole = meta_model(tiny.config(family, num_hidden_layers=layers))
    plan = plan_injection(whole, load_rules(RULES / f"{name}.yaml"))
    found = {
        match.name: match.kwargs["generate_device"]
        for match in plan
        if match.name.endswith("experts")
    }
    assert len(found) == layers
    wanted = {}
    for index in range(layers):
        wanted[f"model.layers.{index}"] = "cuda:0" if index < split else "cuda:1"
    assert layer_devices(found) == wanted
    for operator in ("GraphedLayer", "FusedAttention"):
        matches = [match for match in plan if match.operator.endswith(operator)]
        assert len(matches) == layers
