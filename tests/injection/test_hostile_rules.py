"""Rules files that are damaged or meant to do harm are refused, and quickly."""

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
from hybrimoe_plugin.injection.rules import load_rules, parse_rules
from tests.injection.rules_text import GOOD, RULE


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
