"""OpenAI's own client gets whole answers of Responses."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from more_apis_server import ADD_FUNCTION, Served
from openai_server import NAME

ANSWER = "Grüße, world"


def test_an_answer(served: Served) -> None:
    response = served.respond()
    assert response.output_text == ANSWER
    assert [item.type for item in response.output] == ["message"]
    assert (response.status, response.model, response.error) == ("completed", NAME, None)
    assert response.id.startswith("resp_")


def test_the_prompt_is_the_templates(served: Served) -> None:
    served.respond(instructions="Be kind.")
    assert served.prompt() == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_usage_tells_cached_tokens(served: Served) -> None:
    served.scheduler.cached_tokens = 5
    usage = served.respond().usage
    assert usage.input_tokens_details.cached_tokens == 5
    assert usage.input_tokens == len(served.scheduler.requests[-1].prompt)
    assert usage.output_tokens == len(ANSWER.encode())
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 0.5), ("top_p", 0.25), ("top_k", 7), ("seed", 3)]
)
def test_an_option_reaches_the_scheduler(served: Served, name: str, value: Any) -> None:
    served.respond(extra_body={name: value})
    assert getattr(served.sampling(), name) == value


def test_what_was_followed_is_told(served: Served) -> None:
    response = served.respond(
        temperature=0.5, max_output_tokens=500, metadata={"a": "b"}, store=True, tools=[]
    )
    assert (response.temperature, response.max_output_tokens) == (0.5, 500)
    assert response.metadata == {"a": "b"}
    assert response.model_extra["store"] is False


def test_an_answer_that_was_cut_off_is_incomplete(served: Served) -> None:
    response = served.respond(max_output_tokens=2)
    assert (response.status, response.output_text) == ("incomplete", "Gr")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"


def test_reasoning_and_a_call_are_items_of_their_own(caller: Served) -> None:
    response = caller.respond(tools=[ADD_FUNCTION])
    thought, message, call = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "A sum.")
    assert (message.type, message.content[0].text) == ("message", "Let me add.")
    assert (call.type, call.name, call.arguments) == ("function_call", "add", '{"a": 1, "b": "ü"}')
    assert response.usage.output_tokens_details.reasoning_tokens >= len("A sum.")


def test_an_answer_can_be_sent_back(caller: Served) -> None:
    first = caller.respond(tools=[ADD_FUNCTION])
    call_id = first.output[-1].call_id
    result = {"type": "function_call_output", "call_id": call_id, "output": "3"}
    talk = [{"role": "user", "content": "hello"}, *first.output, result]
    caller.respond(input=talk, tools=[ADD_FUNCTION])
    prompt = caller.prompt()
    assert "<think>A sum.</think>Let me add." in prompt
    assert '"name": "add"' in prompt
    assert prompt.endswith("<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n")


def test_log_probabilities_are_those_of_the_text(caller: Served) -> None:
    include = ["message.output_text.logprobs"]
    response = caller.respond(top_logprobs=2, include=include, tools=[ADD_FUNCTION])
    (text,) = response.output[1].content
    told = bytes(byte for one in text.logprobs for byte in one.bytes).decode()
    assert told.split("</think>")[-1].strip() == "Let me add."
    assert "A sum." not in told
    assert {len(one.top_logprobs) for one in text.logprobs} == {2}


def test_no_log_probabilities_come_unasked(served: Served) -> None:
    assert served.respond().output[0].content[0].logprobs == []
    assert served.sampling().logprobs is None


@pytest.mark.parametrize(("effort", "end"), [("low", "[low]"), ("none", "assistant\n")])
def test_effort_is_the_templates_to_do(served: Served, effort: str, end: str) -> None:
    served.respond(reasoning={"effort": effort})
    assert served.prompt().endswith(end)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function", "name": "sub"}}, "sub"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"extra_body": {"n": 2}}, "n is not"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    served: Served, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=named):
        served.respond(**options)


def test_a_full_queue_says_so(served: Served) -> None:
    served.scheduler.full = True
    with pytest.raises(openai.RateLimitError):
        served.respond()
