"""Reading rules files: what is accepted, and that every fault is a `RulesError` naming file and
line.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import in_time
from torch import nn

from hybrimoe_plugin.errors import RulesError
from hybrimoe_plugin.injection.match import plan_injection
from hybrimoe_plugin.injection.rules import is_trusted, load_rules, parse_rules

GOOD = r"""
- match:
    name: "^model\\.layers\\.\\d+\\.mlp\\.experts$"
    class: torch.nn.Module
  replace:
    class: hybrimoe_plugin.operators.experts.HybriMoEExperts
    kwargs:
      generate_device: "cuda:0"
      cache_ratio: 0.25
      transfer_map:
        30: "cuda:1"
  recursive: False
- match:
    name: "^model.embed_tokens"
  replace:
    class: default
    kwargs: {generate_device: cpu, prefill_device: cpu}
"""


def test_parts_of_a_rule_are_read() -> None:
    first, second = parse_rules(GOOD, "good.yaml").rules
    assert first.match_name == r"^model\.layers\.\d+\.mlp\.experts$"
    assert first.match_class == "torch.nn.Module"
    assert first.kwargs == {
        "generate_device": "cuda:0",
        "cache_ratio": 0.25,
        "transfer_map": {30: "cuda:1"},
    }
    assert (first.index, first.line, first.recursive) == (1, 2, False)
    assert (second.index, second.line, second.recursive, second.replace_class) == (
        2,
        13,
        True,
        "default",
    )


def test_lines_of_parts_are_kept() -> None:
    rule = parse_rules(GOOD, "good.yaml").rules[0]
    assert [rule.line_of(part) for part in ("name", "class", "replace", "kwargs.cache_ratio")] == [
        3,
        4,
        6,
        9,
    ]


def test_class_may_be_left_out_and_means_default() -> None:
    assert (
        parse_rules("- match: {name: x}\n  replace: {kwargs: {generate_device: cpu}}")
        .rules[0]
        .replace_class
        == "default"
    )


def test_anchors_and_merge_keys_work() -> None:
    text = """
- match: {name: a}
  replace: {class: default, kwargs: &where {generate_device: cpu, prefill_device: cpu}}
- match: {name: b}
  replace: {class: default, kwargs: {<<: *where, prefill_device: "cuda:1"}}
"""
    assert parse_rules(text).rules[1].kwargs == {
        "generate_device": "cpu",
        "prefill_device": "cuda:1",
    }


def test_kwargs_of_two_rules_share_nothing() -> None:
    shared = "&r {class: torch.nn.X, kwargs: {m: [1]}}"
    first, second = parse_rules(
        f"- {{match: {{name: a}}, replace: {shared}}}\n- {{match: {{name: b}}, replace: *r}}"
    ).rules
    first.kwargs["m"].append(2)
    assert second.kwargs["m"] == [1]


RULE = "- match: {name: a}\n  replace: {class: default}\n"

BAD = {
    "empty": ("", 1, "empty"),
    "comments only": ("# nothing\n", 1, "empty"),
    "null": ("~", 1, "list of rules"),
    "mapping": ("match: {name: a}", 1, "a mapping"),
    "text": ("hello", 1, "'hello'"),
    "no rules": ("[]", 1, "empty"),
    "syntax": ("- match: {name: a\n  replace: ]", 2, "not valid YAML"),
    "tab": ("-\tmatch:\n\t\tname: a", 1, "not valid YAML"),
    "two documents": (RULE + "---\n" + RULE, 3, "not valid YAML"),
    "duplicate key": (
        "- match: {name: a}\n  match: {name: b}\n  replace: {class: default}",
        2,
        "twice",
    ),
    "duplicate kwarg": (
        RULE[:-2] + ", kwargs: {generate_device: cpu,\n generate_device: cpu}}",
        3,
        "twice",
    ),
    "nested duplicate": (
        "- match: {name: a}\n  replace: {class: torch.nn.X, kwargs: {m: {1: a, 1: b}}}",
        2,
        "twice",
    ),
    "unknown key": (RULE + "  recursiv: False", 3, "did you mean 'recursive'"),
    "unknown match key": (
        "- match: {nmae: a}\n  replace: {class: default}",
        1,
        "did you mean 'name'",
    ),
    "unknown replace key": (
        "- match: {name: a}\n  replace:\n    klass: default",
        3,
        "did you mean 'class'",
    ),
    "no match key": ("- replace: {class: default}", 1, "no 'match'"),
    "no replace": ("- match: {name: a}", 1, "no 'replace'"),
    "empty match": ("- match: {}\n  replace: {class: default}", 1, "needs 'name'"),
    "rule is text": ("- match", 1, "must be a mapping"),
    "name is a number": ("- match: {name: 3}\n  replace: {class: default}", 1, "must be text"),
    "name is a list": ("- match: {name: [a]}\n  replace: {class: default}", 1, "a list"),
    "bad regex": ("- match:\n    name: '(a'\n  replace: {class: default}", 2, "regular expression"),
    "relative class": (
        "- match: {name: a}\n  replace:\n    class: Experts",
        3,
        "dotted class path",
    ),
    "odd class": ("- match: {name: a}\n  replace: {class: 'torch.nn.a b'}", 2, "dotted class path"),
    "match default": (
        "- match: {class: default}\n  replace: {class: default}",
        1,
        "dotted class path",
    ),
    "kwargs is a list": (
        "- match: {name: a}\n  replace: {class: default, kwargs: [1]}",
        2,
        "kwargs of rule 1",
    ),
    "kwargs is nothing": ("- match: {name: a}\n  replace:\n    kwargs:\n", 3, "found nothing"),
    "reserved kwarg": (
        "- match: {name: a}\n  replace: {class: torch.nn.X, kwargs: {config: 1}}",
        2,
        "fills it in",
    ),
    "kwarg no name": (
        "- match: {name: a}\n  replace: {class: torch.nn.X, kwargs: {a b: 1}}",
        2,
        "no argument name",
    ),
    "device": (
        "- match: {name: a}\n  replace:\n    kwargs:\n      generate_device: 'gpu zero'",
        4,
        "cuda:N",
    ),
    "device number": (
        "- match: {name: a}\n  replace:\n    kwargs: {prefill_device: 0}",
        3,
        "cuda:N",
    ),
    "default with op": (
        "- match: {name: a}\n  replace:\n    kwargs: {generate_op: x}",
        3,
        "class: default takes",
    ),
    "recursive is text": (RULE + "  recursive: never", 3, "True or False"),
    "python object": ("- !!python/object/apply:os.system ['true']", 1, "tag"),
    "python object in kwargs": (
        "- match: {name: a}\n  replace: {class: torch.nn.X, kwargs: {a: !!python/name:os.system }}",
        2,
        "tag",
    ),
    "date": (
        "- match: {name: a}\n  replace: {class: torch.nn.X, kwargs: {a: 2026-01-01}}",
        2,
        "tag",
    ),
    "set": ("- match: {name: a}\n  replace: {class: torch.nn.X, kwargs: {a: !!set {b}}}", 2, "tag"),
    "false int": (
        "- match: {name: a}\n  replace: {class: torch.nn.X, kwargs: {a: !!int x}}",
        2,
        "not a int",
    ),
    "list key": (
        "- match: {name: a}\n  replace: {class: torch.nn.X, kwargs: {a: {[1]: 2}}}",
        2,
        "a list",
    ),
    "merge of text": ("- match: {<<: x, name: a}\n  replace: {class: default}", 1, "<<"),
    "unknown alias": ("- *nobody", 1, "not valid YAML"),
    "holds itself": (
        "- match: {name: a}\n  replace: {class: torch.nn.X, kwargs: {a: &a [*a]}}",
        2,
        "nested deeper",
    ),
    "deep": ("[" * 500 + "]" * 500, 1, "nested deeper"),
    "deep unclosed": ("[" * 200_000, 1, "nested deeper"),
    "deep blocks": ("- " * 5_000 + "a", 1, "nested deeper"),
    "control character": ("- match: {name: 'a\x07'}", 1, "not valid YAML"),
}


@pytest.mark.parametrize(("text", "line", "found"), BAD.values(), ids=BAD.keys())
def test_fault_names_file_line_and_what_was_found(text: str, line: int, found: str) -> None:
    with pytest.raises(RulesError) as caught:
        parse_rules(text, "bad.yaml")
    message = str(caught.value)
    assert message.startswith(f"bad.yaml:{line}: ")
    assert found in message
    assert "\n" not in message
    assert len(message) < 500


def _bomb() -> str:
    levels = [
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9) if level else 'x'}]"
        for level in range(12)
    ]
    return "- match: {name: a}\n  replace: {class: torch.nn.X, kwargs: {" + ", ".join(levels) + "}}"


@pytest.mark.parametrize(
    "text", [_bomb(), "- a\n" * 60_000, "x" * 300_000], ids=["aliases", "many", "huge"]
)
def test_bombs_are_refused_quickly(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RulesError):
        parse_rules(text)
    assert time.perf_counter() - start < 10


def test_merge_bomb_is_refused() -> None:
    levels = [
        f"&m{level} [{', '.join([f'*m{level - 1}'] * 9) if level else ''}]" for level in range(12)
    ]
    with pytest.raises(RulesError, match="aliases expand"):
        parse_rules(
            "- {match: {<<: [" + ", ".join(levels) + "], name: a}, replace: {class: default}}"
        )


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"GGUF\x03\x00\x00\x00", "not valid YAML"),
        (b"a" * 300_000, "larger than"),
    ],
)
def test_file_that_is_no_text_is_refused(tmp_path: Path, raw: bytes, found: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_bytes(raw)
    with pytest.raises(RulesError, match=found):
        load_rules(path)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RulesError, match="cannot read"):
            load_rules(path)


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + RULE.encode())
    assert len(load_rules(path).rules) == 1


@pytest.mark.parametrize(
    ("path", "trusted"),
    [
        ("torch.nn.Linear", True),
        ("torch.nnx.A", False),
        ("torch.Tensor", False),
        ("lever_ext.a.B", True),
        ("os.x", False),
    ],
)
def test_trust_goes_by_whole_package_names(path: str, trusted: bool) -> None:
    assert is_trusted(path) is trusted


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
_key = st.sampled_from(
    ["match", "replace", "recursive", "name", "class", "kwargs", "<<", "generate_device"]
)
_ruleish = st.recursive(_json, lambda inner: st.dictionaries(_key, inner, max_size=4), max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(st.lists(_ruleish, max_size=3))
def test_any_yaml_value_parses_or_is_refused(value: list[object]) -> None:
    _parse_or_refuse(yaml.safe_dump(value))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("-:{}[]&*!?|>'\"%@#, \n<ab1.", max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    _parse_or_refuse(text)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_rules_parse_or_are_refused(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(GOOD)))
    cut = data.draw(st.integers(0, 12))
    _parse_or_refuse(
        GOOD[:at] + data.draw(st.text("-:{}[]&*!?|>'\"\n<a1. \t", max_size=6)) + GOOD[at + cut :]
    )


def _parse_or_refuse(text: str) -> None:
    try:
        parsed = parse_rules(text, "fuzz.yaml")
    except RulesError as error:
        refused = str(error)
    else:
        assert parsed.rules
        return
    assert refused.startswith("fuzz.yaml:")


@pytest.mark.parametrize("pattern", ["^([a-z.0-9_]+)+X$"])
def test_a_search_without_end_is_ended(pattern: str) -> None:
    rules = parse_rules(
        f"- match: {{name: '{pattern}'}}\n  replace: {{class: default}}\n", "r.yaml"
    )
    model = nn.ModuleDict({"a_module_with_quite_a_long_name_of_its_own": nn.Linear(1, 1)})
    with (
        in_time(40),
        pytest.raises(RulesError, match=r"r\.yaml:1: match\.name of rule 1, .* takes too long"),
    ):
        plan_injection(model, rules)


def test_a_pattern_without_end_is_refused() -> None:
    with pytest.raises(RulesError, match="longer than 4096 characters"):
        parse_rules(f"- match: {{name: '{'a' * 5000}'}}\n  replace: {{class: default}}\n")


@pytest.mark.parametrize(
    "number", ["1" + ":1" * 50_000, "9" * 5000, "0x" + "f" * 5000], ids=lambda text: text[:4]
)
def test_a_number_without_end_is_refused(number: str) -> None:
    text = f"- match: {{name: a}}\n  replace:\n    class: a.B\n    kwargs: {{size: {number}}}\n"
    with in_time(20), pytest.raises(RulesError, match=":4: .* too many digits"):
        parse_rules(text)
