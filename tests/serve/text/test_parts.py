"""An answer's text is divided the same however it arrives, and none of it is lost."""

from __future__ import annotations

from typing import Any

import pytest
from byte_language import CHATML, byte_tokenizer, named_model
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_plugin.serve.text.formats import Format, format_of
from hybrimoe_plugin.serve.text.parts import (
    Content,
    ListedCalls,
    Marked,
    NamedCall,
    Part,
    Parts,
    Reasoning,
    ToolCall,
)

PROMPT = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def known_format() -> Format:
    found = format_of(named_model(), byte_tokenizer(), CHATML)
    assert found is not None
    return found


FORMAT = known_format()


def marked(prompt: str = PROMPT) -> Marked:
    return FORMAT.parts(prompt, ())


def divided(parts: Parts, *texts: str) -> dict[str, Any]:
    """All content, reasoning and calls."""
    found: list[Part] = []
    for text in texts:
        found += parts.feed(text)
    found += parts.end()
    return {
        "content": "".join(one.text for one in found if isinstance(one, Content)),
        "reasoning": "".join(one.text for one in found if isinstance(one, Reasoning)),
        "calls": [one for one in found if isinstance(one, ToolCall)],
    }


WHOLE = f"<think>\nA < b.\n\nC\n</think>\n\nD. \n{CALL}\n{CALL}"


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_it_does_not_matter_how_text_arrives(cuts: list[int]) -> None:
    places = sorted({0, len(WHOLE), *cuts})
    texts = [WHOLE[a:b] for a, b in zip(places, places[1:], strict=False)]
    assert divided(marked(), *texts) == {
        "content": "D.",
        "reasoning": "A < b.\n\nC",
        "calls": [ToolCall(0, "f", '{"x": 1}'), ToolCall(1, "f", '{"x": 1}')],
    }


@given(st.text(alphabet="ab <>/_\n\t", max_size=40))
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert divided(marked(), *text)["content"] == text


@pytest.mark.parametrize(
    "broken",
    [
        "a <tool_call>not json</tool_call> b",
        'a <tool_call>{"name": "f"',
        "a <tool_call></tool_call> b",
    ],
)
def test_a_call_that_cannot_be_read_is_text(broken: str) -> None:
    assert divided(marked(), *broken) == {"content": broken, "reasoning": "", "calls": []}


def test_a_call_without_arguments_is_text() -> None:
    found = divided(marked(), '<tool_call>{"nome": "f"}</tool_call> b')
    assert '{"nome": "f"}' in found["content"]
    assert found["content"].endswith("b")


def test_what_the_prompt_began_is_not_told_again() -> None:
    assert divided(marked(PROMPT + "<think>\nbegun"), " here</think>\nYes") == {
        "content": "Yes",
        "reasoning": "here",
        "calls": [],
    }


@pytest.mark.parametrize("opening", ["<think>\n\n</think>\n\n", "It is ", "It is <"])
def test_white_space_and_half_signs_of_the_prompt_are_not_told(opening: str) -> None:
    assert divided(marked(PROMPT + opening), *"fine. ")["content"] == "fine. "
    assert divided(marked(PROMPT + opening), " fine")["content"] == " fine"
    assert divided(marked(PROMPT + opening))["content"] == ""


def test_a_sign_that_the_prompt_half_wrote_is_one() -> None:
    assert divided(marked(PROMPT + "<thi"), *"nk>a</think>b") == {
        "content": "b",
        "reasoning": "a",
        "calls": [],
    }


def test_signs_in_a_question_do_not_matter() -> None:
    prompt = "<|im_start|>user\n<|im_start|>assistant\n<think><|im_end|>\n" + PROMPT
    assert divided(marked(prompt), "Yes")["content"] == "Yes"


def test_a_prompt_without_the_sign_of_an_answer_is_not_read() -> None:
    assert divided(marked("text with <think> in it"), "Yes")["content"] == "Yes"


def test_special_tokens_that_are_no_signs_are_hidden() -> None:
    texts = byte_tokenizer().convert_ids_to_tokens(sorted(FORMAT.hidden))
    assert texts == ["<|other|>"]


def test_signs_that_hold_quotes_are_not_hidden() -> None:
    tokenizer = byte_tokenizer()
    signs = ['<|"|>', "<|tool_call>", "<tool_call|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": signs})
    found = format_of(named_model("gemma4"), tokenizer, CHATML)
    assert found is not None
    assert not found.hidden.intersection(tokenizer.convert_tokens_to_ids(signs))
    text = '<|tool_call>call:f{x:1,s:<|"|>a b<|"|>}<tool_call|>'
    parts = found.parts("<|turn>model\n", ())
    assert divided(parts, *text)["calls"] == [ToolCall(0, "f", '{"x": 1, "s": "a b"}')]


def test_models_of_which_nothing_is_known_have_no_format() -> None:
    assert format_of(named_model("mixtral"), byte_tokenizer(), "{{ messages }}") is None


@pytest.mark.parametrize("described", [3, {"fields": {}}, {"fields": {"a": {"open_pattern": "("}}}])
def test_a_description_that_is_damaged_is_not_used(described: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.response_template = described
    assert format_of(named_model(), tokenizer, CHATML) is None


def test_arguments_written_as_text_take_the_types_of_the_schema() -> None:
    found = format_of(named_model("qwen3_5_moe"), byte_tokenizer(), CHATML)
    assert found is not None
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    parts = found.parts(PROMPT, tools)
    text = "<tool_call>\n<function=f>\n<parameter=x>\n3\n</parameter>\n</function>\n</tool_call>"
    assert divided(parts, text)["calls"] == [ToolCall(0, "f", '{"x": 3}')]


def test_the_arguments_of_a_named_call_come_as_they_are_written() -> None:
    assert divided(NamedCall("f"), '{"x"', ": 1}")["calls"] == [
        ToolCall(0, "f", '{"x"'),
        ToolCall(0, None, ": 1}"),
    ]


def test_a_list_of_calls_that_is_cut_off_is_text() -> None:
    text = '[{"name": "f", "arg'
    assert divided(ListedCalls(), text) == {"content": text, "reasoning": "", "calls": []}
