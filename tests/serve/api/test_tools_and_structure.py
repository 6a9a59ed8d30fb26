"""Tool calls, reasoning, and answers of a structure that is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from byte_language import byte_tokenizer, named_model
from openai_server import Talk, talking

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.serve.text import grammars

PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "g"}},
]
CALLS = (
    "<think>\nI call.\n</think>\n\nWait.\n"
    '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def talk() -> Iterator[Talk]:
    with talking(CALLS) as made:
        yield made


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Kinds and specifications of grammars that were compiled; the last stands for itself."""
    found: list[tuple[str, Any]] = []

    def compile_grammar(kind: str, spec: Any, tokenizer: Any) -> Any:
        found.append((kind, spec))
        return found[-1]

    monkeypatch.setattr(grammars, "_compile", compile_grammar)
    return found


def calls_of(found: list[Any]) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in found]


def streamed_calls(stream: Any) -> tuple[list[tuple[str, Any]], str]:
    """Calls by name and arguments, and why the answer ended."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    reason = ""
    for chunk in stream:
        choice = chunk.choices[0]
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            if call.function.name:
                assert call.id and call.type == "function"
                names[call.index] = call.function.name
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    return [(names[at], json.loads(arguments[at])) for at in sorted(names)], reason


def test_calls_reasoning_and_content_are_told_apart(talk: Talk) -> None:
    choice = talk.chat(tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == "I call."
    assert choice.message.content == "Wait."
    assert calls_of(choice.message.tool_calls) == [("f", {"x": 1}), ("g", {})]
    assert '"name": "f"' in talk.prompt()


def test_a_stream_tells_the_same_calls(talk: Talk) -> None:
    calls, reason = streamed_calls(talk.chat(tools=TOOLS, stream=True))
    assert (calls, reason) == ([("f", {"x": 1}), ("g", {})], "tool_calls")


def test_one_call_at_most_where_they_must_not_be_parallel(talk: Talk) -> None:
    message = talk.chat(tools=TOOLS, parallel_tool_calls=False).choices[0].message
    assert calls_of(message.tool_calls) == [("f", {"x": 1})]


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_a_call_is_text(talk: Talk, options: Any) -> None:
    choice = talk.chat(**options).choices[0]
    assert choice.message.tool_calls is None
    assert choice.message.content == CALLS.partition("</think>\n\n")[2]
    assert choice.finish_reason == "stop"
    assert '"name": "f"' not in talk.prompt()


def test_a_call_that_is_cut_off_stays_text(talk: Talk) -> None:
    length = len(talk.service.tokenizer.encode(CALLS.partition('"g"')[0]))
    choice = talk.chat(tools=TOOLS, max_tokens=length).choices[0]
    assert choice.finish_reason == "length"
    assert calls_of(choice.message.tool_calls) == [("f", {"x": 1})]
    assert choice.message.content == 'Wait.\n<tool_call>\n{"name": '


def test_a_named_function_must_be_called(compiled: list[Any]) -> None:
    choice: Any = {"type": "function", "function": {"name": "f"}}
    with talking('{"x": 3}') as talk:
        whole = talk.chat(tools=TOOLS, tool_choice=choice).choices[0]
        streamed = streamed_calls(talk.chat(tools=TOOLS, tool_choice=choice, stream=True))
        assert talk.sampling().grammar == ("json_schema", PARAMETERS)
    assert calls_of(whole.message.tool_calls) == [("f", {"x": 3})]
    assert whole.message.content is None
    assert whole.finish_reason == "stop"
    assert streamed == ([("f", {"x": 3})], "stop")


def test_some_function_must_be_called(compiled: list[Any]) -> None:
    text = '[{"name": "g", "arguments": {}}, {"name": "f", "arguments": {"x": 2}}]'
    with talking(text) as talk:
        whole = talk.chat(tools=TOOLS, tool_choice="required").choices[0]
        streamed = streamed_calls(talk.chat(tools=TOOLS, tool_choice="required", stream=True))
        talk.chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert calls_of(whole.message.tool_calls) == [("g", {}), ("f", {"x": 2})]
    assert whole.finish_reason == "tool_calls"
    assert streamed == ([("g", {}), ("f", {"x": 2})], "tool_calls")
    assert "maxItems" not in compiled[0][1]
    assert compiled[-1][1]["maxItems"] == 1


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "f", "tools": TOOLS}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "h"}}, "tools": TOOLS},
            "tool_choice",
        ),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_choices_that_make_no_sense(talk: Talk, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        talk.chat(**options)
    assert caught.value.param == param


def test_models_whose_calls_are_not_known_say_so(compiled: list[Any]) -> None:
    with talking("[]", model=named_model("mixtral")) as talk:
        with pytest.raises(openai.BadRequestError, match="not known how this model writes"):
            talk.chat(tools=TOOLS)
        assert talk.chat(tools=TOOLS, tool_choice="none").choices[0].message.content == "[]"
        talk.chat(tools=TOOLS, tool_choice="required")
        assert compiled[0][0] == "json_schema"


def test_templates_without_tools_say_so() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    refusal = pytest.raises(openai.BadRequestError, match="knows no tools")
    with talking("x", tokenizer=tokenizer) as talk, refusal:
        talk.chat(tools=TOOLS)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_reasoning_that_the_template_began(model_type: str) -> None:
    with talking("Hm.\n</think>\n\nYes.", model=named_model(model_type)) as talk:
        found = talk.chat(extra_body={"chat_template_kwargs": {"enable_thinking": True}})
        assert talk.prompt().endswith("<think>\n")
    message = found.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_object", None)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": PARAMETERS},
                }
            },
            ("json_schema", PARAMETERS),
        ),
        ({"extra_body": {"guided_json": PARAMETERS}}, ("json_schema", PARAMETERS)),
        ({"extra_body": {"guided_regex": "a+"}}, ("regex", "a+")),
        ({"extra_body": {"guided_choice": ["a", "b"]}}, ("choice", ["a", "b"])),
        ({"extra_body": {"guided_grammar": 'start: "a"'}}, ("ebnf", 'start: "a"')),
        ({"extra_body": {"structured_outputs": {"regex": "b"}}}, ("regex", "b")),
        ({"extra_body": {"structured_outputs": {"json_object": True}}}, ("json_object", None)),
    ],
)
def test_a_structure_becomes_a_grammar(
    talk: Talk, compiled: list[Any], options: Any, expected: Any
) -> None:
    found = talk.chat(**options)
    assert compiled == [expected]
    assert talk.sampling().grammar == expected
    assert found.choices[0].message.content == CALLS  # nothing else is looked for


def test_plain_text_needs_no_grammar(talk: Talk, compiled: list[Any]) -> None:
    talk.chat(response_format={"type": "text"})
    assert compiled == []


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"magic": 1}}, "structured_outputs"),
    ],
)
def test_structures_that_are_none(
    talk: Talk, compiled: list[Any], options: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        talk.chat(extra_body=options)
    assert caught.value.param == param


def test_a_grammar_that_cannot_be_compiled_is_the_clients(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ConfigError("line 1: no rule")

    monkeypatch.setattr(grammars, "_compile", broken)
    with pytest.raises(openai.BadRequestError, match="line 1: no rule") as caught:
        talk.chat(extra_body={"guided_grammar": "?"})
    assert caught.value.param == "guided_grammar"


def test_completions_take_structures_too(talk: Talk, compiled: list[Any]) -> None:
    talk.complete(extra_body={"guided_regex": "a+"})
    assert talk.sampling().grammar == ("regex", "a+")
