"""Which rule takes which module, and that rules which do nothing or cannot work are refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hybrimoe_plugin.errors import ConfigError, RulesError
from hybrimoe_plugin.injection.explain import explain_rows, untouched
from hybrimoe_plugin.injection.match import Match, plan_injection, with_settings
from hybrimoe_plugin.injection.rules import parse_rules


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.SiLU())


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))


class Operator(nn.Module):
    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        generate_device: str = "cpu",
        rank: int = 1,
    ) -> None:
        super().__init__()


class Needy(nn.Module):
    def __init__(
        self, key: str, gguf_loader: Any, config: Any, orig_module: nn.Module, rank: int
    ) -> None:
        super().__init__()


class Tuned(nn.Module):
    def __init__(
        self, key: str, gguf_loader: Any, config: Any, orig_module: nn.Module, **settings: Any
    ) -> None:
        super().__init__()

    @staticmethod
    def check_kwargs(kwargs: Mapping[str, Any]) -> None:
        unknown = set(kwargs) - {"cache_ratio", "cache_bytes", "look_ahead", "generate_device"}
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}")
        if kwargs.get("look_ahead", 1) < 1:
            raise ConfigError(f"look_ahead: expected at least 1, found {kwargs['look_ahead']}")


@pytest.fixture(autouse=True)
def _operators(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("ktransformers.made_up")
    vars(module).update(Operator=Operator, Needy=Needy, Tuned=Tuned, NotAModule=dict, value=3)
    monkeypatch.setitem(sys.modules, "ktransformers", ModuleType("ktransformers"))
    monkeypatch.setitem(sys.modules, "ktransformers.made_up", module)


@pytest.fixture
def model() -> Model:
    with torch.device("meta"):
        return Model()


def rule(
    name: str | None = None,
    replace: str = "default",
    kwargs: str = "",
    tail: str = "",
    cls: str | None = None,
) -> str:
    match = ", ".join(
        f"{key}: '{value}'" for key, value in (("name", name), ("class", cls)) if value is not None
    )
    path = (
        f"ktransformers.made_up.{replace}" if replace in ("Operator", "Needy", "Tuned") else replace
    )
    return f"- match: {{{match}}}\n  replace:\n    class: {path}\n    kwargs: {{{kwargs}}}\n{tail}"


def plan(model: nn.Module, *rules: str, **options: Any) -> list[Match]:
    return plan_injection(model, parse_rules("\n".join(rules), "r.yaml"), **options)


def names(matches: list[Match]) -> list[str]:
    return [match.name for match in matches]


def test_name_is_searched_anywhere_in_the_qualified_name(model: Model) -> None:
    assert names(plan(model, rule("attn", "Operator"))) == [f"layers.{i}.attn" for i in range(3)]


def test_class_matches_instances(model: Model) -> None:
    assert names(plan(model, rule(cls="torch.nn.Embedding"))) == ["embed"]


def test_name_and_class_must_both_match(model: Model) -> None:
    assert names(plan(model, rule("^layers.0", "Operator", cls="torch.nn.Linear"))) == [
        "layers.0.attn",
        "layers.0.mlp.0",
    ]


def test_first_match_wins(model: Model) -> None:
    found = plan(model, rule("layers.1.attn", "Operator"), rule("attn$", "Operator", "rank: 2"))
    assert [(match.name, match.rule.index, match.shadowed) for match in found] == [
        ("layers.0.attn", 2, ()),
        ("layers.1.attn", 1, (2,)),
        ("layers.2.attn", 2, ()),
    ]


def test_children_of_a_matched_module_are_matched_too(model: Model) -> None:
    assert names(plan(model, rule("^layers.0.mlp"))) == [
        "layers.0.mlp",
        "layers.0.mlp.0",
        "layers.0.mlp.1",
    ]


def test_recursive_false_leaves_the_children_alone(model: Model) -> None:
    assert names(plan(model, rule("^layers.0.mlp", tail="  recursive: False"))) == ["layers.0.mlp"]


def test_shared_module_is_matched_under_each_name(model: Model) -> None:
    model.layers[1].attn = model.layers[0].attn
    assert len(plan(model, rule("attn$", "Operator"))) == 3


def test_planning_changes_nothing(model: Model) -> None:
    before = {name: id(module) for name, module in model.named_modules()}
    plan(model, rule("attn$", "Operator"), rule("mlp"))
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_default_rule_may_match_the_whole_model(model: Model) -> None:
    assert plan(model, rule(".*", "default", "generate_device: cpu"))[0].name == ""


BAD = {
    "no match": ([rule("nowhere", "Operator")], "r.yaml:1: rule 1 matches no module"),
    "class never": ([rule(cls="torch.nn.GRU")], "matches no module"),
    "always beaten": (
        [rule("attn"), rule("0.attn", "Operator")],
        "r.yaml:6: rule 2 gets no module: earlier rules take all 1",
    ),
    "twice the same": ([rule("attn"), rule("attn")], "rule 2 gets no module"),
    "under recursive false": (
        [rule("^layers$", tail="  recursive: False"), rule("attn")],
        "only inside modules taken",
    ),
    "whole model": ([rule("", "Operator").replace("''", "'.*'")], "would replace the whole model"),
    "not trusted": (
        [rule("attn", "os.path.join")],
        "r.yaml:3: 'os.path.join' is outside the packages",
    ),
    "match class not trusted": ([rule(cls="collections.OrderedDict")], "outside the packages"),
    "no such module": (
        [rule("attn", "ktransformers.nowhere.X")],
        "cannot import ktransformers.nowhere",
    ),
    "no such class": ([rule("attn", "ktransformers.made_up.Operater")], "did you mean Operator\\?"),
    "not a module": ([rule("attn", "ktransformers.made_up.NotAModule")], "not a torch.nn.Module"),
    "not a class": ([rule("attn", "ktransformers.made_up.value")], "not a torch.nn.Module"),
    "plain module": ([rule("attn", "torch.nn.Linear")], "is no operator"),
    "unknown kwarg": (
        [rule("attn", "Operator", "rnak: 3")],
        "r.yaml:4: .*no argument 'rnak'; did you mean rank\\?",
    ),
    "missing kwarg": ([rule("attn", "Needy")], "needs kwargs rank"),
    "unknown setting": ([rule("attn", "Tuned", "wheels: 3")], "r.yaml:4: .*unknown setting wheels"),
    "bad setting": ([rule("attn", "Tuned", "look_ahead: 0")], "look_ahead: expected at least 1"),
}


@pytest.mark.parametrize(("rules", "found"), BAD.values(), ids=BAD.keys())
def test_rule_that_cannot_work_is_refused(model: Model, rules: list[str], found: str) -> None:
    with pytest.raises(RulesError, match=found):
        plan(model, *rules)


def test_any_package_can_be_trusted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("somewhere")
    vars(module).update(Operator=Operator)
    monkeypatch.setitem(sys.modules, "somewhere", module)
    assert (
        plan(model, rule("attn", "somewhere.Operator"), trust_rules=True)[0].operator_class
        is Operator
    )


def test_settings_override_the_rules_and_reach_tuned_operators_only(model: Model) -> None:
    found = plan(
        model,
        rule("0.attn", "Tuned", "look_ahead: 2, cache_ratio: 0.5"),
        rule("1.attn", "Operator"),
        rule("embed"),
    )
    merged = {match.name: dict(match.kwargs) for match in with_settings(found, {"look_ahead": 3})}
    assert merged == {
        "layers.0.attn": {"look_ahead": 3, "cache_ratio": 0.5},
        "layers.1.attn": {},
        "embed": {},
    }


def test_setting_replaces_the_one_it_excludes(model: Model) -> None:
    found = with_settings(
        plan(model, rule("attn", "Tuned", "cache_ratio: 0.5")), {"cache_bytes": 7}
    )
    assert dict(found[0].kwargs) == {"cache_bytes": 7}


def test_override_that_an_operator_refuses_is_an_error(model: Model) -> None:
    with pytest.raises(ConfigError, match="^look_ahead: expected"):
        with_settings(plan(model, rule("attn", "Tuned")), {"look_ahead": 0})


def test_repeated_layers_share_a_row(model: Model) -> None:
    found = plan(
        model, rule("attn$", "Operator"), rule("^layers.[02].mlp$", kwargs="generate_device: cpu")
    )
    rows = {(row.module, row.count, row.device, row.rule) for row in explain_rows(found)}
    assert rows == {
        ("layers.{0-2}.attn", 3, "its own choice", "1 (line 1)"),
        ("layers.{0,2}.mlp", 2, "cpu", "2 (line 6)"),
    }
    assert len(explain_rows(found, show_all=True)) == 5


def test_untouched_modules_are_counted(model: Model) -> None:
    """Those inside a replaced module too, unless the rule takes it as a whole."""
    left = untouched(model, plan(model, rule("^layers.0$", "Operator", tail="  recursive: False")))
    assert {(item.module, item.count) for item in left} == {
        ("embed", 1),
        ("layers.{1-2}.attn", 2),
        ("layers.{1-2}.mlp.0", 2),
    }
    left = untouched(model, plan(model, rule("^layers.0$", "Operator")))
    assert sum(item.count for item in left) == 7


_pattern = st.sampled_from(
    ["attn", "mlp", "layers", "^layers\\.", "0", "embed", "x", "[", "", "$", "\\d"]
)
_target = st.sampled_from(
    ["default", "Operator", "Needy", "Tuned", "torch.nn.Linear", "ktransformers.made_up.value"]
)
_rule = st.builds(
    rule,
    _pattern | st.text("lay.(|)*+?01$^", max_size=8),
    _target,
    st.sampled_from(["", "rank: 1", "look_ahead: 2"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_rule, min_size=1, max_size=3))
def test_any_rules_plan_or_are_refused(rules: list[str]) -> None:
    with torch.device("meta"):
        model = Model(2)
    try:
        found = plan(model, *rules)
    except RulesError as error:
        refused = str(error)
    else:
        assert len(names(found)) == len(set(names(found)))
        assert {match.rule.index for match in found} == set(range(1, len(rules) + 1))
        return
    assert refused.startswith("r.yaml:")
