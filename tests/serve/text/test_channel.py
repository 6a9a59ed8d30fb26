"""Tokens reach the reader whole, in order, from any thread, however late the reader is."""

from __future__ import annotations

import asyncio
import threading

import pytest
from byte_language import byte_tokenizer

from hybrimoe_plugin.serve.requests import End, Reason, Token
from hybrimoe_plugin.serve.text.channel import AnswerSink, Channel, Item, Piece, Started


async def read(channel: Channel, answers: int) -> list[tuple[int, Item]]:
    found: list[tuple[int, Item]] = []
    while sum(isinstance(item, End) for _, item in found) < answers:
        found += await channel.take()
    return found


def text_of(items: list[tuple[int, Item]], index: int) -> str:
    return "".join(i.text for at, i in items if at == index and isinstance(i, Piece))


def test_several_threads_at_once() -> None:
    async def run() -> list[tuple[int, Item]]:
        channel = Channel()
        tokenizer = byte_tokenizer()

        def answer(index: int) -> None:
            sink = AnswerSink(index, channel, tokenizer)
            sink.started(index)
            for token in tokenizer.encode(f"é{index}" * 50):
                assert sink.put(Token(token))
            sink.end(End(Reason.STOP, 150))

        threads = [threading.Thread(target=answer, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        found = await read(channel, 4)
        for thread in threads:
            thread.join()
        return found

    found = asyncio.run(run())
    for index in range(4):
        own = [item for at, item in found if at == index]
        assert own[0] == Started(index)
        assert isinstance(own[-1], End)
        assert text_of(found, index) == f"é{index}" * 50


def test_what_piled_up_comes_at_once() -> None:
    async def run() -> int:
        channel = Channel()
        sink = AnswerSink(0, channel, byte_tokenizer())
        for token in byte_tokenizer().encode("x" * 100):
            sink.put(Token(token))
        return len(await channel.take())

    assert asyncio.run(run()) == 100


def test_a_stop_string_ends_the_answer_and_held_back_text_comes_last() -> None:
    async def run() -> tuple[bool, bool, str]:
        channel = Channel()
        first, second = byte_tokenizer().encode("ab")
        sink = AnswerSink(0, channel, byte_tokenizer(), ("ab", "xyz"))
        goes_on = sink.put(Token(first)), sink.put(Token(second))
        other = AnswerSink(1, channel, byte_tokenizer(), ("abc",))
        other.put(Token(first))
        other.put(Token(second))
        other.end(End(Reason.LENGTH, 2))
        return (*goes_on, text_of(await read(channel, 1), 1))

    assert asyncio.run(run()) == (True, False, "ab")


def test_hidden_tokens_have_no_text_but_are_told() -> None:
    async def run() -> list[tuple[int, Item]]:
        channel = Channel()
        (token,) = byte_tokenizer().encode("<|other|>")
        hidden = frozenset({token})
        sink = AnswerSink(0, channel, byte_tokenizer(), skip_special_tokens=False, hidden=hidden)
        assert sink.put(Token(token))
        return await channel.take()

    ((_, piece),) = asyncio.run(run())
    assert isinstance(piece, Piece)
    assert piece.text == "" and piece.token is not None


def test_a_reader_that_is_gone_does_not_disturb_the_scheduler() -> None:
    async def made() -> Channel:
        return Channel()

    channel = asyncio.run(made())
    sink = AnswerSink(0, channel, byte_tokenizer())
    assert sink.put(Token(65))
    sink.end(End(Reason.CANCELLED, 1))


class Unreadable:
    """A tokenizer that cannot decode."""

    def decode(self, *_args: object, **_options: object) -> str:
        raise OverflowError


def test_the_end_is_told_though_the_text_cannot_be_read() -> None:
    async def run() -> list[tuple[int, Item]]:
        channel = Channel()
        sink = AnswerSink(0, channel, Unreadable())
        for call in (lambda: sink.put(Token(5)), lambda: sink.end(End(Reason.FAILED, 1))):
            with pytest.raises(OverflowError):
                call()
        return channel.ready()

    assert asyncio.run(run())[-1] == (0, End(Reason.FAILED, 1))
