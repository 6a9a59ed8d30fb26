"""Messages of every kind reach the model as its chat template writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from byte_language import byte_tokenizer, named_model
from openai_server import Talk, talking

USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def talk() -> Iterator[Talk]:
    with talking("ok") as made:
        yield made


def turns(*pairs: tuple[str, str]) -> str:
    told = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs)
    return told + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], [("user", "x")]),
        ([{"role": "developer", "content": "d"}, USER], [("system", "d"), ("user", "x")]),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                }
            ],
            [("user", "a\nb")],
        ),
        (
            [USER, {"role": "assistant", "reasoning_content": "r", "content": "c"}, USER],
            [("user", "x"), ("assistant", "<think>r</think>c"), ("user", "x")],
        ),
        ([USER, {"role": "assistant", "content": None}], [("user", "x"), ("assistant", "")]),
    ],
)
def test_messages(talk: Talk, messages: Any, expected: list[tuple[str, str]]) -> None:
    talk.chat(messages=messages)
    assert talk.prompt() == turns(*expected)


def test_calls_and_their_results(talk: Talk) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    result = {"role": "tool", "tool_call_id": "1", "content": "2"}
    talk.chat(messages=[USER, {"role": "assistant", "content": "c", "tool_calls": [call]}, result])
    # As an object, which templates go through.
    assert '"arguments": {"a": 1}' in talk.prompt()
    assert "assistant\nc[{" in talk.prompt()
    assert "<|im_start|>tool\n2<|im_end|>" in talk.prompt()


def test_the_last_message_can_be_continued(talk: Talk) -> None:
    messages = [USER, {"role": "assistant", "content": "It is "}]
    talk.chat(
        messages=messages,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert talk.prompt().endswith("<|im_start|>assistant\nIt is ")


def test_the_answer_need_not_be_begun(talk: Talk) -> None:
    talk.chat(extra_body={"add_generation_prompt": False})
    assert talk.prompt() == "<|im_start|>user\nhello"


def test_variables_reach_the_template(talk: Talk) -> None:
    talk.chat(extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert talk.prompt().endswith("<think>\n")
    talk.chat(reasoning_effort="low")
    assert talk.prompt().endswith("[low]")


def test_a_templates_refusal_is_told_in_its_words() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    refusal = pytest.raises(openai.BadRequestError, match="roles must alternate")
    with talking("x", tokenizer=byte_tokenizer(template)) as talk, refusal as caught:
        talk.chat()
    assert caught.value.param == "messages"


def test_tokens_that_the_model_has_not_are_refused() -> None:
    refusal = pytest.raises(openai.BadRequestError, match="embedding has 100 rows")
    with talking("x", model=named_model(rows=100)) as talk, refusal:
        talk.chat()


def test_a_slow_template_keeps_nobody_else_waiting() -> None:
    loop = "{% for i in range(90000) %}"
    slow = f"{{{{ messages[0].content }}}}{loop}{loop}{{% endfor %}}{{% endfor %}}"
    with talking("ok", tokenizer=byte_tokenizer(slow)) as talk:
        talk.service.language.prompts._template._seconds = 1
        connection = talk.connection()
        headers = {"content-type": "application/json"}
        body = '{"messages": [{"role": "user", "content": "x"}]}'
        connection.request("POST", "/v1/chat/completions", body, headers)
        assert talk.complete().choices[0].text == "ok"  # while the template still runs
        answer = connection.getresponse()
        assert answer.status == 400
        assert b"seconds that it may take" in answer.read()
