"""The helpers of OpenAI's client, which are strict about what streams and answers hold."""

from __future__ import annotations

from typing import Any

import pytest
from openai_server import NAME, talking
from pydantic import BaseModel

from hybrimoe_plugin.serve.text import grammars

MESSAGES: Any = [{"role": "user", "content": "hello"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}},
                "required": ["x"],
                "additionalProperties": False,
            },
        },
    }
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


class Point(BaseModel):
    x: int
    y: int


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "_compile", lambda *_: None)


def test_an_answer_becomes_an_object() -> None:
    with talking('{"x": 1, "y": 2}') as talk:
        made = talk.client.chat.completions
        found = made.parse(model=NAME, messages=MESSAGES, response_format=Point)
    assert found.choices[0].message.parsed == Point(x=1, y=2)


def test_a_stream_becomes_an_answer() -> None:
    with talking("Grüße. " * 20, seconds_per_token=0.0005) as talk:
        made = talk.client.chat.completions
        with made.stream(
            model=NAME,
            messages=MESSAGES,
            n=2,
            logprobs=True,
            stream_options={"include_usage": True},
        ) as stream:
            parts = [event.delta for event in stream if event.type == "content.delta"]
            found = stream.get_final_completion()
    assert [choice.message.content for choice in found.choices] == ["Grüße. " * 20] * 2
    assert len("".join(parts)) == 2 * len("Grüße. " * 20)
    assert found.usage is not None
    assert found.usage.completion_tokens == 2 * len(("Grüße. " * 20).encode())
    logprobs = found.choices[1].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == len(("Grüße. " * 20).encode())


@pytest.mark.parametrize("is_named", [False, True])
def test_a_stream_becomes_a_call(is_named: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "f"}} if is_named else "auto"
    with talking('{"x": 1}' if is_named else CALL) as talk:
        made = talk.client.chat.completions
        with made.stream(model=NAME, messages=MESSAGES, tools=TOOLS, tool_choice=choice) as stream:
            found = stream.get_final_completion()
    calls = found.choices[0].message.tool_calls
    assert calls is not None
    assert [(call.function.name, call.function.parsed_arguments) for call in calls] == [
        ("f", {"x": 1})
    ]


def test_a_conversation_goes_on_with_the_clients_own_message() -> None:
    with talking(CALL) as talk:
        message = talk.chat(tools=TOOLS).choices[0].message
        call = message.tool_calls[0]
        result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
        talk.chat(messages=[*MESSAGES, message.model_dump(), result], tools=TOOLS)
        assert call.id in talk.prompt()
        assert '"arguments": {"x": 1}' in talk.prompt()
