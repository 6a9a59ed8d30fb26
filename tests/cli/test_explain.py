"""`hybrimoe explain`: a dry run from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrimoe_plugin.cli.main import main

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
}
RULES = r"""
- match:
    name: "^model\\.layers\\.\\d+\\.mlp\\.experts$"
  replace:
    class: hybrimoe_plugin.operators.experts.HybriMoEExperts
    kwargs: {generate_device: "cuda:0", cache_ratio: 0.25}
  recursive: False
- match:
    name: "^lm_head"
    class: torch.nn.Linear
  replace:
    class: default
    kwargs: {generate_device: "cpu"}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def explain(tmp_path: Path, model: Path, rules: str, *flags: str) -> int:
    path = tmp_path / "rules.yaml"
    path.write_text(rules)
    return main(["explain", str(path), "--model_path", str(model), *flags])


def test_table_shows_modules_operators_devices_and_rules(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(tmp_path, model, RULES) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    experts = "model.layers.{0-2}.mlp.experts"
    operator = "HybriMoEExperts"
    assert [experts, "x3", "MixtralExperts", operator, "cuda:0", "1", "(line", "2)"] in rows
    assert ["lm_head", "x1", "Linear", "default", "cpu", "2", "(line", "8)"] in rows


def test_all_shows_every_layer(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(tmp_path, model, RULES, "--all") == 0
    out = capsys.readouterr().out
    assert all(f"model.layers.{layer}.mlp.experts" in out for layer in range(3))


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("mlp", "block_sparse_moe", "rules.yaml:3: rule 1 matches no module of MixtralForCausalLM"),
        (
            "cache_ratio: 0.25",
            "cache_ratio: 25",
            "rules.yaml:6: kwargs of rule 1: cache_ratio: expected 0.0 to 1.0",
        ),
        (
            "HybriMoEExperts",
            "HybridExperts",
            "rules.yaml:5: module hybrimoe_plugin.operators.experts has no class",
        ),
        (
            "replace:",
            "replac:",
            "rules.yaml:4: rule 1 has the unknown key 'replac'; did you mean replace?",
        ),
    ],
)
def test_faulty_rules_exit_2_naming_the_line(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, found: str
) -> None:
    assert explain(tmp_path, model, RULES.replace(old, new, 1)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert found in captured.err


def test_model_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "rules.yaml"]) == 2
    assert "--model_path" in capsys.readouterr().err


def test_directory_without_a_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(tmp_path, tmp_path, RULES) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_packaged_rules_of_the_family_are_the_default(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--model_path", str(model)]) == 0
    assert "model.layers.{0-2}.mlp.experts" in capsys.readouterr().out
