"""Grammars of strangers: refused by a typed error, or compiled; nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from hybrimoe_plugin.serve.sampling import GrammarError
from hybrimoe_plugin.serve.sampling.grammar import compile_grammar

from .vocabularies import byte_level


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
REFUSED = {
    "kind": ("yaml", "a"),
    "no schema": ("json_schema", None),
    "schema is a list": ("json_schema", []),
    "schema is false within": ("json_schema", {"allOf": [False]}),
    "schema's type": ("json_schema", {"type": 7}),
    "not JSON": ("json_schema", "{"),
    "brackets of JSON": ("json_schema", "[" * 60_000),
    "number": ("json_schema", {"const": float("nan")}),
    "surrogate": ("choice", ["\ud800"]),
    "keyword": ("json_schema", {"type": "array", "contains": {}}),
    "deep": ("json_schema", nested(100)),
    "large": ("json_schema", {"enum": ["x" * 100_000]}),
    "remote": ("json_schema", {"$ref": "http://127.0.0.1:9/schema"}),
    "file": ("json_schema", {"$ref": "file:///etc/passwd"}),
    "reference to itself": ("json_schema", {"$ref": "#"}),
    "loop": ("json_schema", LOOP),
    "crossed": (
        "json_schema",
        {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for i in range(9)]} for j in range(12)]},
    ),
    "regex": ("regex", "(a"),
    "look": ("regex", "(?=a)b"),
    "brackets": ("regex", "(" * 5000 + "a" + ")" * 5000),
    "regex is no text": ("regex", 7),
    "no choice": ("choice", []),
    "choices are numbers": ("choice", [1]),
    "choice is a text": ("choice", "ab"),
    "lark": ("lark", 'start: "'),
    "lark without rule": ("lark", "start: other"),
    "empty": ("lark", ""),
    "import": ("lark", 'start: x\n%import "/etc/passwd"'),
    "lark brackets": ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    "ebnf": ("ebnf", 'root ::= "' + "\\" * 500),
    "ebnf brackets": ("ebnf", "root ::= " + "(" * 3000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tokenizer: Any, name: str) -> None:
    kind, spec = REFUSED[name]
    with pytest.raises(GrammarError) as found:
        compile_grammar(kind, spec, tokenizer)
    assert 0 < len(str(found.value)) < 500


COMPILED = {
    "large enumeration": ("json_schema", {"enum": [f"value {i}" for i in range(3000)]}),
    "long": ("json_schema", {"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "many items": ("json_schema", {"type": "array", "minItems": 10**12}),
    "recursive": ("json_schema", {"type": "array", "items": {"$ref": "#"}}),
    "catastrophic in other engines": ("regex", "(a+)+b"),
    "exponential if determinised at once": ("regex", "(a|b)*a(a|b){30}"),
    "ambiguous": ("lark", 'start: a a a a\na: a a | "x" | ""'),
    "properties": (
        "json_schema",
        {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(1000)}},
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(tokenizer: Any, name: str) -> None:
    kind, spec = COMPILED[name]
    assert compile_grammar(kind, spec, tokenizer).kind == kind


def test_repeated_repetition_is_compiled_or_refused(tokenizer: Any) -> None:
    """Which of them depends on the tokens: how far one reaches into the expression."""
    try:
        compile_grammar("regex", "((a{1000}){1000}){1000}", tokenizer)
    except GrammarError as error:
        assert "too many expressions" in str(error)
