"""Anthropic's own client gets whole answers of Messages."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from more_apis_server import ADD, Served, serving
from openai_server import NAME

from hybrimoe_plugin.serve.service import Limits

ANSWER = "Grüße, world"
CALL = {"type": "tool_use", "id": "c", "name": "add", "input": {}}


def test_an_answer(served: Served) -> None:
    message = served.message()
    assert [(block.type, block.text) for block in message.content] == [("text", ANSWER)]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.type, message.role, message.model) == ("message", "assistant", NAME)
    assert message.id.startswith("msg_")
    assert message._request_id == served.scheduler.requests[-1].id.removesuffix("-0")


def test_the_prompt_is_the_templates(served: Served) -> None:
    served.message(system="Be kind.")
    assert served.prompt() == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_usage_tells_cached_tokens_apart(served: Served) -> None:
    served.scheduler.cached_tokens = 5
    usage = served.message().usage
    assert usage.cache_read_input_tokens == 5
    assert usage.input_tokens == len(served.scheduler.requests[-1].prompt) - 5
    assert usage.output_tokens == len(ANSWER.encode())


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.5), ("top_p", 0.25), ("top_k", 7)])
def test_an_option_reaches_the_scheduler(served: Served, name: str, value: Any) -> None:
    served.message(extra_body={name: value})
    assert getattr(served.sampling(), name) == value


def test_an_answer_ends_at_its_limit(served: Served) -> None:
    message = served.message(max_tokens=2)
    assert (message.content[0].text, message.stop_reason) == ("Gr", "max_tokens")


def test_a_stop_sequence_is_told(served: Served) -> None:
    message = served.message(stop_sequences=["wor", ", wo"])
    assert message.content[0].text == "Grüße"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ", wo")


def test_thinking_and_a_call_are_blocks_of_their_own(caller: Served) -> None:
    message = caller.message(tools=[ADD])
    thinking, text, call = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "A sum.")
    assert (text.type, text.text) == ("text", "Let me add.")
    assert (call.type, call.name, call.input) == ("tool_use", "add", {"a": 1, "b": "ü"})
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens_details.thinking_tokens >= len("A sum.")


def test_an_answer_can_be_sent_back(caller: Served) -> None:
    first = caller.message(tools=[ADD])
    call = first.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "3"}
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    caller.message(messages=talk, tools=[ADD])
    prompt = caller.prompt()
    assert "<think>A sum.</think>Let me add." in prompt
    assert '"name": "add"' in prompt
    assert prompt.endswith("<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n")


def test_thinking_can_be_left_out(caller: Served) -> None:
    message = caller.message(tools=[ADD], thinking={"type": "adaptive", "display": "omitted"})
    assert (message.content[0].type, message.content[0].thinking) == ("thinking", "")


@pytest.mark.parametrize(
    ("thinking", "thinks"),
    [({"type": "enabled", "budget_tokens": 1024}, True), ({"type": "disabled"}, False)],
)
def test_thinking_is_the_templates_to_do(served: Served, thinking: Any, thinks: bool) -> None:
    served.message(thinking=thinking)
    assert served.prompt().endswith("<think>\n") is thinks


def test_effort_is_the_templates_to_do(served: Served) -> None:
    served.message(output_config={"effort": "low"})
    assert served.prompt().endswith("[low]")


def test_the_last_message_of_the_assistant_is_continued(served: Served) -> None:
    begun = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "It is"}]
    served.message(messages=begun)
    assert served.prompt().endswith("<|im_start|>assistant\nIt is")


def test_no_tools_are_shown_where_none_may_be_used(served: Served) -> None:
    served.message(tools=[ADD], tool_choice={"type": "none"})
    assert "add" not in served.prompt()


def test_tokens_are_counted_as_they_are_asked_for(served: Served) -> None:
    body = {"system": "Be kind.", "messages": [{"role": "user", "content": "hello"}]}
    counted = served.anthropic.messages.count_tokens(model=NAME, **body)  # type: ignore[arg-type]
    served.message(**body)
    assert counted.input_tokens == len(served.scheduler.requests[-1].prompt)


def test_cache_control_changes_nothing(served: Served) -> None:
    block = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
    served.message(messages=[{"role": "user", "content": [block]}])
    assert "hello<|im_end|>" in served.prompt()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "sub"}}, "sub"),
        ({"extra_body": {"stop": ["x"]}}, "stop_sequences"),
        ({"extra_body": {"mcp_servers": [{}]}}, "mcp_servers"),
        ({"messages": [{"role": "assistant", "content": [CALL]}]}, "its result"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    served: Served, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=named) as refused:
        served.message(**options)
    assert refused.value.body["type"] == "error"  # type: ignore[index, call-overload]
    assert refused.value.type == "invalid_request_error"


def test_the_beta_client_is_answered_too(served: Served) -> None:
    made: Any = served.anthropic.beta.messages
    assert made.create(**served.asked(), betas=["x-2026-01-01"]).content[0].text == ANSWER


def test_another_model_is_not_found(served: Served) -> None:
    with pytest.raises(anthropic.NotFoundError, match="some-other"):
        served.message(model="some-other")


def test_a_full_queue_says_so(served: Served) -> None:
    served.scheduler.full = True
    with pytest.raises(anthropic.RateLimitError):
        served.message()


def test_an_answer_that_takes_too_long_fails() -> None:
    with (
        serving("x" * 999, seconds_per_token=0.01, limits=Limits(seconds=0.05)) as served,
        pytest.raises(anthropic.InternalServerError, match="not finished"),
    ):
        served.message()
