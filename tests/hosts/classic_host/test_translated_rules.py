"""`hybrimoe translate_rules`: placement by layers moves over, and the rest is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.errors import RulesError
from hybrimoe_plugin.families.packaged_rules import engine_rules
from hybrimoe_plugin.hosts.ktransformers.translate import translate
from hybrimoe_plugin.injection.rules import parse_rules

EXPERTS = "hybrimoe_plugin.operators.experts.HybriMoEExperts"
THEIRS = "ktransformers.operators"
BLOCK = {
    "match": {"class": "ktransformers.models.modeling_deepseek_v3.DeepseekV3MoE"},
    "replace": {"class": f"{THEIRS}.experts.KDeepseekV3MoE"},
}


def experts(layers: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "match": {"name": rf"^model\.layers\.{layers}\.mlp\.experts$"},
        "replace": {"class": f"{THEIRS}.experts.KTransformersExperts", "kwargs": kwargs},
        "recursive": False,
    }


def replaced(name: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "match": {"name": "x"},
        "replace": {"class": f"{THEIRS}.{name}", "kwargs": kwargs},
    }


def translated(*rules: dict[str, Any]) -> Any:
    return translate(parse_rules(yaml.safe_dump(list(rules)), "old.yaml"))


def placed(text: str) -> list[tuple[str, str]]:
    """(layers, device) of the experts' rules."""
    return [
        (rule.match_name.split(".", 2)[2], str(rule.kwargs["generate_device"]))
        for rule in parse_rules(text).rules
        if rule.replace_class == EXPERTS and rule.match_name is not None
    ]


def test_layers_keep_their_devices_in_their_order() -> None:
    found = translated(
        BLOCK,
        # Computed on the GPU; on the CPU beside a GPU; on the CPU, as everything of the layer.
        experts("[0-3]", generate_device="cuda:1", generate_op="KExpertsMarlin"),
        experts("[4-9]", generate_device="cpu", out_device="cuda:0", backend="AMXInt8"),
        experts("1[0-9]", generate_device="cpu", out_device="cpu"),
        experts("2[0-9]"),
    )
    assert [device for _, device in placed(found.text)] == ["cuda:1", "cuda:0", "cpu", "auto"]
    assert found.family == "deepseek_v3" and found.needed
    assert len(found.notes) == 5
    assert "backend dropped" in found.notes[2] and "AMXInt8" in found.notes[2]


def test_what_is_not_about_experts_comes_from_the_packaged_rules() -> None:
    found = translated(BLOCK, experts(r"\d+"))
    packaged = yaml.safe_load(engine_rules("deepseek_v3").read_text())
    assert yaml.safe_load(found.text) == packaged and not found.needed
    quantised = translated(
        BLOCK,
        experts(r"\d+"),
        replaced("linear.KTransformersLinear", generate_op="KLinearMarlin"),
    )
    dense = {rule.kwargs.get("dense") for rule in parse_rules(quantised.text).rules}
    assert dense == {None, "quantised"} and quantised.needed


def test_mixtrals_experts_are_found_under_their_present_name() -> None:
    block = replaced("experts.KMistralSparseMoEBlock")
    rule = experts(r"\d+")
    rule["match"]["name"] = r"^model\.layers\..*\.block_sparse_moe\.experts$"
    found = translated(block, rule)
    assert r"^model\.layers\..*\.mlp\.experts$" in found.text


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([BLOCK], "no rule for experts"),
        ([experts("0")], "which model is it for"),
        ([BLOCK, replaced("experts.KQwen2MoeSparseMoeBlock"), experts("0")], "and qwen2_moe"),
        ([BLOCK, experts("0", out_device="xpu")], "old.yaml:11: out_device xpu: only cpu and cuda"),
        ([BLOCK, experts("0"), replaced("models.KLlamaModel")], "not supported here: attention"),
        (
            [{"match": {"class": "transformers.models"}, "replace": {"class": "default"}}],
            "which model is it for?",
        ),
        ([BLOCK, experts("0"), replaced("experts.Own")], "nothing is known of it"),
        (
            [{"match": {"name": "x"}, "replace": {"class": EXPERTS}}],
            "is no operator of kTransformers",
        ),
    ],
)
def test_what_cannot_move_is_refused_by_name(rules: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(RulesError, match="old.yaml") as error:
        translated(*rules)
    assert said in str(error.value)


def test_the_command_prints_rules_and_says_what_became_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(yaml.safe_dump([BLOCK, experts(r"\d+", out_device="cuda:1")]))
    assert main(["translate_rules", str(old)]) == 0
    out, err = capsys.readouterr()
    assert placed(out) == [(r"\d+\.mlp\.experts$", "cuda:1")]
    assert "rule 1 (line 1): KDeepseekV3MoE dropped" in err
    old.write_text("!!python/object/apply:os.system [true]\n")
    assert main(["translate_rules", str(old)]) == 2


def test_a_file_name_with_escapes_leaves_the_rules_readable() -> None:
    text = yaml.safe_dump([BLOCK, experts("0")])
    found = translate(parse_rules(text, "old\x1b[2J.yaml")).text
    assert r"old\x1b[2J.yaml" in found
    assert yaml.safe_load(found)
