"""`hybrimoe explain`: a dry run from config.json alone, or with the header of the weights."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
import torch

from hybrimoe_plugin import load_model
from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.cli.picture.draw import picture
from hybrimoe_plugin.cli.picture.svg import WIDTH
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.errors import BudgetError
from hybrimoe_plugin.hosts.transformers.preparation import predict
from hybrimoe_plugin.hosts.transformers.preparation.prediction import (
    DISK,
    MAPPED,
    MEMORY,
    PLACES,
    LayerPlace,
    Prediction,
)

ROOT = Path(__file__).resolve().parents[2]

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
    assert [experts, "x3", operator, "cuda:0", "1", "(line", "2)"] in rows
    assert ["lm_head", "x1", "default", "cpu", "2", "(line", "8)"] in rows


def test_all_shows_every_layer(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(tmp_path, model, RULES, "--all") == 0
    out = capsys.readouterr().out
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.experts"
        assert [name, "x1", "MixtralExperts", "HybriMoEExperts"] in [
            line.split()[:4] for line in out.splitlines()
        ]


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


def table(out: str) -> list[list[str]]:
    """Lines as cells, which two or more spaces part."""
    return [re.split(r"  +", line.strip()) for line in out.splitlines()]


def test_every_setting_is_shown_with_who_set_it(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(tmp_path, model, RULES, "--cache_ratio", "0.5", "--context", "32768") == 0
    out = capsys.readouterr().out
    assert "scheduler" not in out
    assert f"{len(fields(Settings)) - 2} other settings have their defaults" in out
    flags = "--all --cache_ratio 0.5 --context 32768"
    assert explain(tmp_path, model, RULES, *flags.split()) == 0
    rows = table(capsys.readouterr().out)
    assert ["cache_ratio", "0.5", "--cache_ratio"] in rows
    assert ["context", "32768", "--context"] in rows
    assert ["scheduler", "hybrimoe", "default"] in rows
    assert ["dense", "auto", "default, and no operator here uses it"] in rows
    names = [row[0] for row in rows]
    assert all(item.name in names for item in fields(Settings))


def test_settings_of_the_rules_name_their_lines(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = RULES.replace("\\\\d+", "0").replace("0.25", "0.75")
    both = other + RULES.partition('- match:\n    name: "^lm')[0]
    assert explain(tmp_path, model, both) == 0
    rows = table(capsys.readouterr().out)
    assert ["cache_ratio", "0.75", "rule 1 (line 6)", "model.layers.0.mlp.experts"] in rows
    assert ["cache_ratio", "0.25", "rule 3 (line 19)", "model.layers.{1-2}.mlp.experts"] in rows


def test_the_sample_in_the_docs_is_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Modules and settings, for a model of as many layers as the demo model."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 30}))
    flags = "--cache_ratio 0.25 --accelerator emulated --weights mapped"
    assert main(["explain", "--model_path", str(tmp_path), *flags.split()]) == 0
    said = table(capsys.readouterr().out)
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    (sample,) = re.findall(r"```text\n(MixtralForCausalLM by .*?)```", page, re.DOTALL)
    shown = table(sample.partition("memory  ")[0])
    assert len(shown) > 15
    for row in shown[1:]:
        assert row in said


def test_modules_left_as_they_are_are_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(tmp_path, model, RULES.replace("\\\\d+", "[01]")) == 0
    rows = table(capsys.readouterr().out)
    assert ["model.layers.2.mlp.experts", "x1", "MixtralExperts"] in rows
    assert ["model.layers.{0-2}.mlp.gate", "x3", "MixtralTopKRouter"] in rows


def test_memory_is_predicted_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = tmp_path / "model.gguf"
    tiny.write_quantised(gguf, "mixtral")
    picture = tmp_path / "picture.svg"
    flags = "--accelerator emulated --cache_ratio 0.5 --weights mapped --context 512"
    command = ["explain", "--gguf_path", str(gguf), *flags.split(), "--picture", str(picture)]
    assert main(command) == 0
    out = capsys.readouterr().out
    rows = table(out)
    # 16 experts of three matrices of 64 x 256 in Q8_0, half of them cached.
    assert ["experts, as stored", "816.0 KiB"] in [row[-2:] for row in rows]
    assert ["8 cached experts (50% of all)", "408.0 KiB"] in [row[-2:] for row in rows]
    assert "KV cache of 256 tokens" in out  # the model's own context is shorter
    assert "warning" not in out
    tree = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    check_picture(tree)
    words = " ".join(text for text in tree.itertext())
    for place in ("emulated accelerator", PLACES[MEMORY], PLACES[MAPPED], "layers 0-1"):
        assert place in words
    assert "816.0 KiB" in words


def test_a_gpu_that_is_not_there_is_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gguf = tmp_path / "model.gguf"
    tiny.write_quantised(gguf, "mixtral")
    command = ["explain", "--gguf_path", str(gguf), "--device", "cuda:1", "--rules", "Mixtral"]
    assert main(command) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert ["accelerator", "cuda", "--device"] in rows
    places = [row[0] for row in rows[rows.index(["memory", "part", "size"]) + 1 :]]
    assert [name for name in places if name in (*PLACES.values(), "cuda:1")] == [
        "cuda:1",
        "DRAM, pinned for transfers",
    ]
    assert "note: the memory of cuda:1 is not known here: 25% of the experts" in out
    assert "warning: loading would be refused: accelerator cuda on cuda:1: " in out
    assert main([*command, "other.yaml"]) == 2
    assert "RULES other.yaml and --rules Mixtral differ" in capsys.readouterr().err
    assert main(["explain", "--gguf_path", str(gguf), "--cache_ratio", "0.5"]) == 0
    assert "note: cache_ratio has no effect: there is no acc" in capsys.readouterr().out


def test_dense_parts_in_two_places_are_drawn_in_two_colours() -> None:
    layer = LayerPlace(0, {MAPPED: 300, MEMORY: 100}, MAPPED, 8, 0, True)
    drawn = picture(Prediction((), (layer,), context=1, free={}), "two places")
    assert re.search(r'width="112.5" height="9" class="mapped"', drawn)
    assert re.search(r'width="37.5" height="9" class="memory"', drawn)


def check_picture(tree: ElementTree.Element) -> None:
    """Every shape lies inside, has a size and a colour that the style defines."""
    width, height = (float(tree.attrib[name]) for name in ("width", "height"))
    assert width == WIDTH
    style = "".join(tree.itertext())
    shapes = [item for item in tree.iter() if item.tag.endswith(("rect", "text"))]
    assert len(shapes) > 20
    for item in shapes:
        x, y = float(item.attrib["x"]), float(item.attrib["y"])
        assert 0 <= x <= width
        assert 0 <= y <= height
        assert x + float(item.attrib.get("width", 0)) <= width + 0.1
        assert y + float(item.attrib.get("height", 0)) <= height + 0.1
        for kind in item.attrib.get("class", "").split():
            assert f".{kind} {{" in style


def test_the_picture_in_the_docs_is_well_formed() -> None:
    text = (ROOT / "docs" / "figures" / "placement.svg").read_text(encoding="utf-8")
    tree = ElementTree.fromstring(text)
    check_picture(tree)
    assert "prefers-color-scheme: dark" in text
    assert "layers 0-29" in text


def test_what_loading_would_refuse_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "model.gguf"
    tiny.write_quantised(gguf, "mixtral")
    monkeypatch.setattr(predict, "free_host_bytes", lambda: 1000)
    assert main(["explain", "--gguf_path", str(gguf), "--weights", "mapped"]) == 0
    out = capsys.readouterr().out
    assert "warning: loading would be refused: the weights do not fit into memory" in out
    assert PLACES[DISK] in out
    with pytest.raises(BudgetError, match="do not fit into memory"):
        load_model(None, gguf, weights="mapped", progress=False)


def test_a_picture_needs_weights(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(tmp_path, model, RULES, "--picture", str(tmp_path / "p.svg")) == 2
    captured = capsys.readouterr()
    assert "memory: not predicted without weights; give --gguf_path" in captured.out
    assert "--picture needs" in captured.err


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


@pytest.fixture
def drawn(tmp_path: Path) -> list[str]:
    """A command that can draw; the picture's name is to follow."""
    gguf = tmp_path / "model.gguf"
    tiny.write_quantised(gguf, "mixtral")
    flags = "--accelerator emulated --weights mapped --picture"
    return ["explain", "--gguf_path", str(gguf), *flags.split()]


def test_only_pictures_are_replaced_by_pictures(
    drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = tmp_path / "model.gguf"
    before = gguf.read_bytes()
    assert main([*drawn, str(gguf)]) == 2
    assert f"--picture {gguf} exists and is not replaced" in capsys.readouterr().err
    assert gguf.read_bytes() == before
    picture, link = tmp_path / "picture.svg", tmp_path / "link.svg"
    link.symlink_to(picture)
    assert main([*drawn, str(link)]) == 0
    picture.chmod(0o640)
    assert main([*drawn, str(link)]) == 0
    assert link.is_symlink() and picture.stat().st_mode & 0o777 == 0o640
    ElementTree.fromstring(picture.read_text(encoding="utf-8"))


def test_a_full_disk_is_named(drawn: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*drawn, "/dev/full"]) == 2
    assert "hybrimoe: error: /dev/full: No space left" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bell\x07.yaml", "bytes\udcff.yaml", "esc\x1b[2J.yaml"])
def test_names_that_cannot_be_shown(
    name: str, drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules, picture = tmp_path / name, tmp_path / "picture.svg"
    rules.write_text(RULES.replace('"cuda:0"', "auto"))
    assert main([*drawn, str(picture), str(rules)]) == 0
    shown = name.encode("unicode_escape").decode()
    out = capsys.readouterr().out
    assert shown in out and name not in out
    tree = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    assert shown in "".join(tree.itertext())
