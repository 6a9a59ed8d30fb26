"""Reading rules files: what is accepted, and that every fault names file and line."""

from __future__ import annotations

import pytest

from hybrimoe_plugin.errors import RulesError
from hybrimoe_plugin.injection.rules import is_trusted, parse_rules
from tests.injection.rules_text import GOOD, RULE


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
    "unknown key": (RULE + "  recursiv: False", 3, "did you mean recursive?"),
    "unknown match key": (
        "- match: {nmae: a}\n  replace: {class: default}",
        1,
        "did you mean name?",
    ),
    "unknown replace key": (
        "- match: {name: a}\n  replace:\n    klass: default",
        3,
        "did you mean class?",
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
