"""An answer: exact counts, times, text up to a stop string, and the lines printed after it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted_chat import Model, Tokenizer, chat

from hybrimoe_plugin.cli.chat.answer import TimedStreamer, Timing
from hybrimoe_plugin.cli.chat.report import EngineReport
from hybrimoe_plugin.hosts.transformers.chat.text import AnswerText
from hybrimoe_plugin.policy.counters import Counters


def test_the_answer_alone_is_on_stdout_and_counts_are_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat(Model("Paris.")).answer("capital?")
    out, err = capsys.readouterr()
    assert out == "Paris.\n"
    lines = err.splitlines()
    assert lines[1] == "prompt eval count:    14 token(s)"
    # Seven tokens with the end-of-text token; the prompt's pass gave the first.
    assert lines[4] == "eval count:           6 token(s)"
    names = [
        f"{kind} {value}"
        for kind in ("prompt eval", "eval")
        for value in ("count", "duration", "rate")
    ]
    assert [line.split(":")[0] for line in lines[1:7]] == names
    chat(Model("Paris."), quiet=True).answer("capital?")
    assert capsys.readouterr() == ("Paris.\n", "")


def test_rates_are_the_printed_counts_by_the_printed_durations() -> None:
    clock: Iterator[float] = iter([10.0, 11.2344, 13.0, 13.3337])
    timing = Timing(prompt_tokens=4, kept_tokens=9)
    streamer = TimedStreamer(timing, clock=lambda: next(clock))
    streamer.put(torch.tensor([[1, 2, 3, 4]]))
    for token in range(3):
        streamer.put(torch.tensor([token]))
    assert timing.context_tokens == 9 + 4 + 3
    kept, *lines = (line.split(":")[1].split()[0] for line in timing.lines())
    assert kept == "9"
    assert lines == ["4", "1.234s", "3.24", "2", "2.099s", "0.95"]


def test_an_answer_of_one_token_has_no_rate() -> None:
    timing = Timing(prompt_tokens=1)
    streamer = TimedStreamer(timing)
    streamer.put(torch.tensor([[1]]))
    streamer.put(torch.tensor([1]))
    assert timing.lines()[3:] == [
        "eval count:           0 token(s)",
        "eval duration:        0.000s",
        "eval rate:            0.00 tokens/s",
    ]


@pytest.mark.parametrize(
    ("said", "stops", "text"),
    [
        ("It is. END and more", ["END"], "It is. "),
        ("ENTER, EEND", ["END"], "ENTER, E"),
        ("no such text EN", ["END"], "no such text EN"),
        ("one, two", ["two", ", t"], "one"),
        ("END", ["END"], ""),
        ("abc", [], "abc"),
    ],
)
def test_an_answer_ends_before_a_stop_string(said: str, stops: list[str], text: str) -> None:
    written: list[str] = []
    answer = AnswerText(Tokenizer(), written.append, stops)
    for char in said:
        answer.put([ord(char)])
        assert text.startswith("".join(written)), "never more than the answer is written"
    answer.end()
    assert ("".join(written), answer.text) == (text, text)
    assert answer.stopped == any(stop in said for stop in stops)


def test_characters_of_several_tokens_are_written_whole() -> None:
    class Bytes:
        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode(errors="replace")

    written: list[str] = []
    answer = AnswerText(Bytes(), written.append)
    for byte in "aü€ \U0001f600".encode():
        answer.put([byte])
    assert written == ["a", "ü", "€", " ", "\U0001f600"]
    answer.put("ü".encode()[:1])
    answer.end()
    assert answer.text.endswith("\ufffd")


def test_generation_ends_with_the_stop_string(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("one two three")
    talk = chat(model, stops=("two",))
    assert talk.answer("count") is True
    assert talk.messages[-1]["content"] == "one "
    assert capsys.readouterr().out == "one \n"
    assert talk.timing is not None and talk.timing.tokens == len("one two")


def handle(*accelerators: object) -> tuple[Counters, Any]:
    counters = Counters()
    engines = [SimpleNamespace(accelerator=each) for each in accelerators]
    return counters, SimpleNamespace(
        hybrimoe=SimpleNamespace(stats=counters.snapshot, emulated=True, engines=engines)
    )


def test_engine_line_counts_what_happened_since_the_last() -> None:
    counters, model = handle(None, "emulated")
    report = EngineReport(model)
    report()
    counters.activations, counters.cache_hits = 8, 6
    counters.experts_cpu, counters.experts_accelerator = 3, 5
    counters.demand_loads, counters.fills = 1, 1
    counters.prefetches, counters.prefetches_used = 2, 1
    line = (
        "engine: cache hits 6/8 (75.0%), experts on CPU 3 / accelerator 5 / transferred 4, "
        "prefetches used 1/2 [accelerator emulated]"
    )
    assert report() == line
    assert report() != line
    assert report.facts() == [f"since loading, {line}"]


def test_there_is_no_engine_line_where_only_the_cpu_computes() -> None:
    counters, model = handle(None)
    counters.experts_cpu = 641
    report = EngineReport(model)
    assert report() is None
    assert report.facts() == ["experts computed:     641 on the CPU"]
    assert EngineReport(SimpleNamespace())() is None
