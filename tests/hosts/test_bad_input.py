"""What does not fit is refused with a typed error, and nothing is half done."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from hybrimoe_plugin import load_model
from hybrimoe_plugin.errors import (
    BackendError,
    BudgetError,
    ConfigError,
    HybriMoEError,
    RulesError,
    WeightsError,
)
from hybrimoe_plugin.hosts.transformers.preparation.prepare import plan_for
from tests.fuzz.gguf_file import parse, serialise


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("mixtral"), "mixtral")


def load(path: Path, model_path: Path | None = None, rules: Any = None, **settings: Any) -> Any:
    settings = {"dtype": "float32", "cpu_backend": "torch", "progress": False, **settings}
    model, _ = load_model(model_path, path, rules, **settings)
    return model


def rewritten(path: Path, target: Path, old: bytes, new: bytes) -> Path:
    """A copy with a name changed into another of its length."""
    raw = path.read_bytes()
    assert old in raw
    assert len(old) == len(new)
    target.write_bytes(raw.replace(old, new))
    return target


def test_a_missing_tensor_is_named(mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    rewritten(mixtral, path, b"blk.1.attn_norm.weight", b"blk.1.attn_nirm.weight")
    with pytest.raises(WeightsError, match=r"blk\.1\.attn_norm\.weight.*missing"):
        load(path)
    rewritten(mixtral, path, b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_op_exps.weight")
    with pytest.raises(WeightsError, match=r"ffn_up_exps"):
        load(path)


def test_another_architecture_is_named(mixtral: Path, tmp_path: Path) -> None:
    path = rewritten(mixtral, tmp_path / "m.gguf", b"llama", b"lemma")
    with pytest.raises(
        WeightsError, match="'lemma' is not supported.*qwen3moe, .*checkpoint directory"
    ):
        load(path)


@pytest.mark.parametrize("part", ["attn_q", "attn_k"])
def test_a_flat_projection_is_named(part: str, tmp_path: Path) -> None:
    """As many values as the matrix has, in one dimension: its rows cannot be put into heads."""
    path = tiny.write(tmp_path, "mixtral")
    file = parse(path.read_bytes())
    name = f"blk.1.{part}.weight"
    at = [tensor.name.decode() for tensor in file.tensors].index(name)
    matrix = file.tensors[at]
    count = math.prod(matrix.shape)
    file.tensors[at] = replace(matrix, shape=(count,))
    path.write_bytes(serialise(file))
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        load_model(None, path, progress=False, accelerator="none")


def test_a_directory_of_another_model_is_refused(mixtral: Path, tmp_path: Path) -> None:
    tiny.config("mixtral", num_local_experts=4).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="number of experts is 4 there and 8"):
        load(mixtral, tmp_path)
    tiny.config("mixtral").save_pretrained(tmp_path)
    load(mixtral, tmp_path).hybrimoe.close()
    with pytest.raises(WeightsError, match="no such model directory"):
        load(mixtral, tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json"):
        load(mixtral, tmp_path)


def test_budgets_backends_and_settings(mixtral: Path) -> None:
    with pytest.raises(BudgetError):
        load(mixtral, accelerator="emulated", cache_bytes=100)
    with pytest.raises(HybriMoEError, match="scheduler"):
        load(mixtral, scheduler="magic")
    with pytest.raises(ConfigError, match="dtype"):
        load_model(None, mixtral, dtype="int3")
    with pytest.raises(HybriMoEError, match="no-such-profile"):
        load(mixtral, profile="no-such-profile.json")
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="CUDA"):
            load(mixtral, accelerator="cuda")


def test_a_missing_tokenizer_is_told_before_the_machine_is_measured(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("hybrimoe_plugin.hosts.transformers.load.bind")
    with pytest.raises(ConfigError, match="no usable tokenizer: give --model_path"):
        load(mixtral, require_tokenizer=True)


def test_no_weights_no_rules(tmp_path: Path, mixtral: Path) -> None:
    with pytest.raises(ConfigError, match="gguf_path"):
        load_model()
    with pytest.raises(RulesError, match="no such rules file"):
        load(mixtral, rules="Nothing.yaml")
    dense = tiny.write(tmp_path, "llama")
    with pytest.raises(RulesError, match="no packaged rules for model type 'llama': it is a dense"):
        load(dense)
    other = rewritten(dense, tmp_path / "other.gguf", b"llama", b"lemma")
    with pytest.raises(WeightsError, match="'lemma' is not supported.*; it is a dense model"):
        load(other)


def test_rules_that_inject_nothing_usable(mixtral: Path, tmp_path: Path) -> None:
    rules = tmp_path / "r.yaml"
    rules.write_text("- match: {name: nothing_like_this}\n  replace: {class: default}\n")
    with pytest.raises(RulesError, match="matches no module"):
        load(mixtral, rules=rules)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packaged_rules_fit_their_family_without_weights(family: str, tmp_path: Path) -> None:
    config = tiny.config(family)
    config.save_pretrained(tmp_path)
    plan = plan_for(tmp_path, None).plan
    layers = config.num_hidden_layers
    dense = getattr(config, "first_k_dense_replace", None) or 0
    attention = "FusedMLA" if hasattr(config, "kv_lora_rank") else "FusedAttention"
    operators = [match.operator.rpartition(".")[2] for match in plan]
    assert operators.count("HybriMoEExperts") == layers - dense
    assert operators.count(attention) == layers


@pytest.mark.parametrize("name", ["^lm_head$", "^model$", r"^model\\.norm$"])
def test_experts_are_not_put_where_no_layer_is(name: str, mixtral: Path, tmp_path: Path) -> None:
    rules = tmp_path / "r.yaml"
    operator = "hybrimoe_plugin.operators.experts.HybriMoEExperts"
    rules.write_text(f'- match: {{name: "{name}"}}\n  replace: {{class: {operator}}}\n')
    with pytest.raises(ConfigError, match=r"r\.yaml.*no module of a decoder layer"):
        load(mixtral, rules=rules)
