"""kTransformers' classes in rules for the default host: the table, and the errors that read it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
from torch import nn

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.errors import RulesError
from hybrimoe_plugin.families.packaged_rules import engine_rules
from hybrimoe_plugin.injection.classes import check_kwargs, import_class, import_classes
from hybrimoe_plugin.injection.ktransformers_classes import (
    BLOCKS,
    KWARGS,
    MODELS,
    OPERATORS,
    Fate,
    advice_on,
    find_moved,
)
from hybrimoe_plugin.injection.rules import Rule, parse_rules
from hybrimoe_plugin.operators.experts import HybriMoEExperts

without_host = pytest.mark.skipif(
    find_spec("ktransformers") is not None, reason="ktransformers is installed here"
)


def rule(text: str) -> Rule:
    return parse_rules(text, "old.yaml").rules[0]


def test_what_the_table_says_to_write_exists() -> None:
    for row in OPERATORS:
        if row.fate is Fate.OPERATOR:
            home, _, name = row.text.rpartition(".")
            operator = getattr(importlib.import_module(home), name)
            assert issubclass(operator, nn.Module)


def test_the_table_is_whole() -> None:
    names = [(row.module, name) for row in OPERATORS for name in row.names]
    assert len(names) == len(set(names))
    for name in BLOCKS:
        row = find_moved(f"ktransformers.operators.experts.{name}")
        assert row is not None and row.fate is Fate.AUTOMATIC
    assert set(BLOCKS.values()) == set(MODELS.values())
    for kind in MODELS.values():
        assert engine_rules(kind).is_file()
        importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    # What ours take too must not be called theirs.
    assert not set(KWARGS) & {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("operators.experts.KTransformersExpertsV2", "write hybrimoe_plugin.operators.experts."),
        ("operators.RoPE.YarnRotaryEmbeddingV3", "leave the rule out: the model computes"),
        ("operators.ascend.ascend_gate.KDeepseekV3GateA2", "not supported here: Ascend"),
        ("models.modeling_deepseek.DeepseekV2MoE", "transformers.models.deepseek_v2."),
    ],
)
def test_advice(path: str, said: str) -> None:
    assert said in str(advice_on(f"ktransformers.{path}"))
    assert advice_on(f"mine.{path}") is None
    assert advice_on("ktransformers.operators.experts.Unheard") is None


@without_host
def test_a_rule_of_theirs_is_refused_by_name_and_with_what_to_write() -> None:
    old = rule(
        "- match:\n"
        "    class: ktransformers.models.modeling_deepseek_v3.DeepseekV3RMSNorm\n"
        "  replace:\n"
        "    class: ktransformers.operators.layernorm.RMSNorm\n"
    )
    assert "ktransformers" not in sys.modules
    for part, path in (("class", str(old.match_class)), ("replace", old.replace_class)):
        with pytest.raises(RulesError) as error:
            import_class(old, path, part)
        said = str(error.value)
        assert said.startswith(f"old.yaml:{old.line_of(part)}: {path} is a class of kTransformers")
        assert "write hybrimoe_plugin.operators.norm.FusedRMSNorm" in said
        assert "hybrimoe translate_rules old.yaml" in said


def test_an_argument_of_theirs_is_named_as_such() -> None:
    ours = rule(
        "- match: {name: experts}\n"
        "  replace:\n"
        "    class: hybrimoe_plugin.operators.experts.HybriMoEExperts\n"
        "    kwargs: {backend: AMXInt8}\n"
    )
    with pytest.raises(RulesError, match=r"old\.yaml:4: .*cpu_backend chooses the CPU's kernels"):
        check_kwargs(ours, HybriMoEExperts, ours.kwargs)


def test_a_class_of_a_later_version_is_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the classic host, which has the module but not yet the class."""
    theirs = "ktransformers.operators.experts"
    older = ModuleType(theirs)
    for name in ("ktransformers", "ktransformers.operators"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, theirs, older)
    text = f"- match: {{name: x}}\n  replace: {{class: {theirs}.KTransformersExpertsV2}}\n"
    with pytest.raises(RulesError, match=r"old\.yaml:2: .* since 0\.2\.4 .*translate_rules"):
        import_classes(parse_rules(text, "old.yaml"))
