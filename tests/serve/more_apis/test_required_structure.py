"""Answers that must have a structure, or must be calls, of Messages and Responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from more_apis_server import ADD, ADD_FUNCTION, SCHEMA, Served, serving
from openai_server import NAME
from pydantic import BaseModel

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.serve.text import grammars

ARGUMENTS = '{"a": 1}'
CALLS = '[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]'


class Sum(BaseModel):
    a: int


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> Iterator[None]:
    """Kind and specification stand for the grammar that is compiled from them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammars, "_compile", lambda kind, spec, tokenizer: (kind, spec))
        yield


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(ARGUMENTS) as made:
        yield made


@pytest.fixture(scope="module")
def caller() -> Iterator[Served]:
    with serving(CALLS) as made:
        yield made


def test_a_schema_of_responses_becomes_a_grammar(served: Served) -> None:
    made: Any = served.client.responses
    response = made.parse(model=NAME, input="hello", text_format=Sum)
    assert response.output_parsed == Sum(a=1)
    kind, spec = served.sampling().grammar
    assert (kind, spec["required"]) == ("json_schema", ["a"])


def test_a_schema_of_messages_becomes_a_grammar(served: Served) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    message = served.message(output_config={"format": form}, thinking={"type": "adaptive"})
    assert message.content[0].text == ARGUMENTS
    assert served.sampling().grammar == ("json_schema", SCHEMA)
    assert not served.prompt().endswith("<think>\n")


def test_any_object_of_responses_becomes_a_grammar(served: Served) -> None:
    served.respond(text={"format": {"type": "json_object"}})
    assert served.sampling().grammar == ("json_object", None)


def test_free_text_needs_no_grammar(served: Served) -> None:
    served.respond(text={"format": {"type": "text"}})
    assert served.sampling().grammar is None


def test_a_named_tool_of_messages_is_called(served: Served) -> None:
    options = {"tools": [ADD], "tool_choice": {"type": "tool", "name": "add"}}
    message = served.message(**options)
    assert [(block.name, block.input) for block in message.content] == [("add", {"a": 1})]
    assert message.stop_reason == "tool_use"
    with served.anthropic.messages.stream(**served.asked(**options)) as stream:
        assert stream.get_final_message().content[0].input == {"a": 1}


def test_a_named_function_of_responses_is_called(served: Served) -> None:
    choice = {"type": "function", "name": "add"}
    response = served.respond(tools=[ADD_FUNCTION], tool_choice=choice)
    assert [(item.name, item.arguments) for item in response.output] == [("add", ARGUMENTS)]
    assert served.sampling().grammar == ("json_schema", SCHEMA)


def test_a_named_tool_that_was_cut_off_has_no_input(served: Served) -> None:
    choice = {"type": "tool", "name": "add"}
    message = served.message(tools=[ADD], tool_choice=choice, max_tokens=3)
    assert message.content[0].input == {}
    assert message.stop_reason == "max_tokens"


def test_any_tool_of_messages_may_be_called_several_times(caller: Served) -> None:
    message = caller.message(tools=[ADD], tool_choice={"type": "any"})
    assert [block.input for block in message.content] == [{"a": 1}, {"a": 2}]
    assert len({block.id for block in message.content}) == 2


def test_one_call_at_most_is_in_the_grammar(caller: Served) -> None:
    caller.message(tools=[ADD], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert caller.sampling().grammar[1]["maxItems"] == 1
    caller.respond(tools=[ADD_FUNCTION], tool_choice="required", parallel_tool_calls=False)
    assert caller.sampling().grammar[1]["maxItems"] == 1


def test_a_required_call_of_responses_streams(caller: Served) -> None:
    options: Any = {"tools": [ADD_FUNCTION], "tool_choice": "required"}
    with caller.client.responses.stream(model=NAME, input="hello", **options) as stream:
        output: Any = stream.get_final_response().output
    assert [item.arguments for item in output] == ['{"a": 1}', '{"a": 2}']


def test_structure_and_tools_exclude_each_other(served: Served) -> None:
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    with pytest.raises(anthropic.BadRequestError, match="leaves no room"):
        served.message(tools=[ADD], output_config={"format": form})
    with pytest.raises(openai.BadRequestError, match="leaves no room"):
        served.respond(tools=[ADD_FUNCTION], text={"format": form})


def test_a_grammar_that_cannot_be_compiled_is_the_clients(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise HybriMoEError("too large")

    monkeypatch.setattr(grammars, "_compile", broken)
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    with pytest.raises(openai.BadRequestError, match="text.format: too large"):
        served.respond(text={"format": form})


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": NaN}', '{"a": 1e999}', "[]", "{"])
def test_arguments_that_json_cannot_write_fail_nothing(arguments: str) -> None:
    choice = {"type": "tool", "name": "add"}
    with serving(arguments) as served:
        body = {**served.asked(), "tools": [ADD], "tool_choice": choice}
        for stream in (True, False):
            status, text = served.send("/v1/messages", {**body, "stream": stream})
            assert (status, "tool_use" in text) == (200, True)
