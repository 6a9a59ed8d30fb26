"""The text of an answer as its tokens come."""

from __future__ import annotations

from typing import Any

import pytest
from byte_language import byte_tokenizer

from hybrimoe_plugin.hosts.transformers.chat.text import AnswerText

TOKENIZER = byte_tokenizer()


def text_of(ids: list[int], *stops: str, **options: Any) -> str:
    written: list[str] = []
    text = AnswerText(TOKENIZER, written.append, stops, **options)
    for token in ids:
        text.put([token])
    text.end()
    assert "".join(written) == text.text
    return text.text


@pytest.mark.parametrize("keep", [False, True])
def test_a_stop_string_can_be_kept(keep: bool) -> None:
    ids = TOKENIZER.encode("It is. END of it")
    assert text_of(ids, "END", keep_stop=keep) == "It is. " + ("END" if keep else "")


def test_of_stop_strings_at_one_place_the_longest_is_kept() -> None:
    text = AnswerText(TOKENIZER, lambda _: None, ("ab", "abc"), keep_stop=True)
    text.put(TOKENIZER.encode("xabcd"))
    assert text.text == "xabc"


def test_special_tokens_are_text_where_they_are_asked_for() -> None:
    ids = TOKENIZER.encode("a<|other|>b")
    assert text_of(ids) == "ab"
    assert text_of(ids, skip_special_tokens=False) == "a<|other|>b"


@pytest.mark.parametrize("token", ["<|other|>", "broken"])
def test_tokens_without_text_cost_no_more_as_they_go_on(token: str) -> None:
    # The first byte of a character of two, again and again.
    one = TOKENIZER.encode("é")[0] if token == "broken" else TOKENIZER.encode(token)[0]
    ids = [*TOKENIZER.encode("é"), *[one] * 500, *TOKENIZER.encode("é!")]
    counts: list[int] = []

    class Counting:
        def decode(self, ids: list[int], **options: Any) -> str:
            counts.append(len(ids))
            return str(TOKENIZER.decode(ids, **options))

    text = AnswerText(Counting(), lambda _: None)
    for each in ids:
        text.put([each])
    text.end()
    assert max(counts) < 30
    assert text.text.startswith("é") and text.text.endswith("é!")
