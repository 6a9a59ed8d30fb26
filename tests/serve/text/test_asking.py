"""Several answers of one request: all or none, until the time is over."""

from __future__ import annotations

import asyncio
import time

import pytest
from byte_language import byte_tokenizer, named_model
from scripted_scheduler import ScriptedScheduler, ScriptedTicket

from hybrimoe_plugin.serve.requests import LateError, QueueFullError, Request, Sink
from hybrimoe_plugin.serve.service import Limits, Service
from hybrimoe_plugin.serve.text.asking import Answer, Answers, Question, collected


class Small(ScriptedScheduler):
    """Has room for two."""

    def submit(self, request: Request, sink: Sink) -> ScriptedTicket:
        if len(self.requests) == 2:
            raise QueueFullError("full")
        return super().submit(request, sink)


def service(
    scheduler: type[ScriptedScheduler] = ScriptedScheduler,
    seconds_per_token: float = 0.0,
    seconds: float | None = None,
) -> Service:
    tokenizer = byte_tokenizer()
    made = scheduler(tokenizer, "é" * 50, seconds_per_token)
    return Service(named_model(), tokenizer, "m", made, Limits(seconds=seconds))


def questions(count: int) -> list[Question]:
    return [Question(Request(str(at), (1,))) for at in range(count)]


def test_where_one_is_refused_none_is_computed() -> None:
    asked = service(Small, seconds_per_token=0.01)

    async def run() -> None:
        with pytest.raises(QueueFullError):
            await collected(asked, questions(3))

    asyncio.run(run())
    assert isinstance(asked.scheduler, Small)
    assert [ticket.cancelled.is_set() for ticket in asked.scheduler.tickets] == [True, True]


def test_an_answer_that_came_in_time_may_be_read_late() -> None:
    asked = service(seconds=0.05)

    async def run() -> Answer:
        answers = Answers(asked, questions(1))
        assert isinstance(asked.scheduler, ScriptedScheduler)
        asked.scheduler.threads[0].join()
        time.sleep(0.1)
        found = Answer()
        async for delta in answers.deltas():
            found.add(delta)
        return found

    assert asyncio.run(run()).content == "é" * 50


def test_an_answer_that_goes_on_is_not_waited_for() -> None:
    asked = service(seconds_per_token=1000, seconds=0.05)

    async def run() -> None:
        with pytest.raises(LateError):
            await collected(asked, questions(2))

    asyncio.run(run())
    assert isinstance(asked.scheduler, ScriptedScheduler)
    assert all(ticket.cancelled.is_set() for ticket in asked.scheduler.tickets)
