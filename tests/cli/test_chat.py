"""The conversation: history, exact counts, Ctrl-C, what is printed. A scripted model stands in for
a real one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrimoe_plugin.cli.answer import Stop, TimedStreamer
from hybrimoe_plugin.cli.chat import Chat, ChatOptions
from hybrimoe_plugin.cli.report import EngineReport
from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.policy.counters import Counters

END = 0


class Tokenizer:
    """One token per character."""

    chat_template: str | None = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"
    )

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            input_ids=torch.tensor([[ord(char) for char in text]], dtype=torch.int64).reshape(1, -1)
        )

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(int(i)) for i in ([ids] if isinstance(ids, int) else ids) if i != END)


class Model:
    """Says what it is told to, token by token, as `generate` would."""

    def __init__(self, *answers: str, context: int = 1000) -> None:
        self.answers = list(answers)
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.generation_config = SimpleNamespace(
            eos_token_id=[END], pad_token_id=None, max_length=20
        )
        self.device = torch.device("cpu")
        self.prompts: list[str] = []
        self.configs: list[Any] = []
        self.interrupt_after: int | None = None

    def generate(
        self,
        ids: torch.Tensor,
        *,
        streamer: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **_: Any,
    ) -> None:
        self.prompts.append("".join(chr(i) for i in ids[0].tolist()))
        self.configs.append(generation_config)
        streamer.put(ids)
        for count, token in enumerate([*map(ord, self.answers.pop(0)), END], start=1):
            streamer.put(torch.tensor([token]))
            if count == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
            if bool(stopping_criteria(ids, None).all()):
                break
        streamer.end()


def chat(model: Model, report: Any = lambda: None, **options: Any) -> Chat:
    return Chat(model, Tokenizer(), ChatOptions(**options), report)


def test_history_goes_into_the_next_prompt() -> None:
    model = Model("Paris.", "2")
    talk = chat(model)
    talk.answer("capital?")
    talk.answer("1+1?")
    assert model.prompts == ["<u>capital?<a>", "<u>capital?<a>Paris.<u>1+1?<a>"]


def test_answer_and_exact_counts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    chat(Model("Paris.")).answer("capital?")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Paris."
    assert lines[2] == "prompt eval count:    14 token(s)"
    assert lines[5] == "eval count:           7 token(s)"
    names = [
        f"{kind} {value}"
        for kind in ("prompt eval", "eval")
        for value in ("count", "duration", "rate")
    ]
    assert [line.split(":")[0] for line in lines[2:8]] == names


def test_times_are_taken_at_the_tokens() -> None:
    clock: Iterator[float] = iter([10.0, 12.0, 13.0, 15.0])
    streamer = TimedStreamer(None, lambda: next(clock))
    streamer.start(4)
    streamer.put(torch.tensor([[1, 2, 3, 4]]))
    for token in range(3):
        streamer.put(torch.tensor([token]))
    timing = streamer.timing
    assert (timing.prompt_seconds, timing.eval_seconds, timing.tokens, timing.ids) == (
        2.0,
        3.0,
        3,
        [0, 1, 2],
    )
    assert timing.lines()[2].endswith(" 2.00 tokens/s")
    assert timing.lines()[5].endswith(" 0.67 tokens/s")


def test_answer_of_one_token_has_no_rate() -> None:
    streamer = TimedStreamer(None)
    streamer.start(1)
    streamer.put(torch.tensor([[1]]))
    streamer.put(torch.tensor([1]))
    assert streamer.timing.lines()[5].endswith(" 0.00 tokens/s")


def test_interrupt_ends_the_answer_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("abcdef", "next")
    model.interrupt_after = 3
    before = signal.getsignal(signal.SIGINT)
    talk = chat(model)
    assert talk.answer("go") is False
    assert signal.getsignal(signal.SIGINT) is before
    model.interrupt_after = None
    assert talk.answer("on") is True
    assert model.prompts[1] == "<u>go<a>abc<u>on<a>"
    assert "eval count:           3 token(s)" in capsys.readouterr().out


def test_second_interrupt_does_not_wait() -> None:
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_of_the_prompt_does_not_wait_for_the_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A long prompt's pass has no token to wait for."""
    model = Model("next")
    finish, passes = model.generate, []

    def generate(ids: torch.Tensor, **rest: Any) -> None:
        passes.append("begun")
        rest["streamer"].put(ids)
        os.kill(os.getpid(), signal.SIGINT)
        passes.append("finished")

    model.generate = generate  # type: ignore[assignment, method-assign]
    talk = chat(model)
    with pytest.raises(KeyboardInterrupt):
        talk.answer("a long one")
    assert passes == ["begun"] and talk.messages == []
    model.generate = finish  # type: ignore[method-assign]
    talk.answer("on")
    # The text streamer takes the next prompt for a prompt, not for more of the answer that was
    # broken off.
    assert capsys.readouterr().out.splitlines()[:2] == ["", "next"]


@pytest.mark.parametrize(
    "error", [RuntimeError("probability tensor contains inf"), MemoryError(), ValueError("x")]
)
def test_a_chat_goes_on_after_errors_of_libraries(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model("fine")
    generate = model.generate

    def fail(*_: Any, **__: Any) -> None:
        model.generate = generate  # type: ignore[method-assign]
        raise error

    model.generate = fail  # type: ignore[method-assign]
    lines = iter(["first", "second", "/exit"])
    talk = chat(model)
    talk.loop(lambda _prompt: next(lines))
    out, err = capsys.readouterr()
    assert (
        "fine" in out and f"error: the answer could not be computed: {type(error).__name__}" in err
    )
    assert [message["content"] for message in talk.messages] == ["second", "fine"]


def test_what_is_no_text_is_refused_and_the_chat_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bytes that are not UTF-8 come as lone surrogates; those that are UTF-8 after all come so in
    the C locale.
    """
    latin, utf8 = (
        b"gr\xfc\xdf".decode("utf-8", "surrogateescape"),
        "grüß".encode().decode("ascii", "surrogateescape"),
    )
    model = Model("a", "b")
    lines = iter([latin, "\ud800", utf8, "\ufeffhello", "/exit"])
    chat(model).loop(lambda _prompt: next(lines))
    assert model.prompts == ["<u>grüß<a>", "<u>grüß<a>a<u>hello<a>"]
    assert capsys.readouterr().err.count("the message is not UTF-8 text") == 2


def test_tokens_beyond_the_embedding_are_refused_before_the_model_sees_them() -> None:
    model = Model("a")
    model.get_input_embeddings = lambda: torch.nn.Embedding(200, 4)  # type: ignore[attr-defined]
    talk = chat(model)
    with pytest.raises(
        ConfigError, match="token 252 .'ü'., and the model's embedding has 200 rows"
    ):
        talk.answer("ü")
    assert model.prompts == []
    talk.answer("u")


def test_failed_answer_leaves_no_question_behind() -> None:
    model = Model()
    talk = chat(model)
    with pytest.raises(BackendError, match="IndexError: pop from empty list"):
        talk.answer("anyone?")
    assert talk.messages == []


def test_long_conversation_loses_its_oldest_turns(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("a" * 10, "b" * 10, "c", context=60)
    talk = chat(model, max_new_tokens=12)
    for question in ("1" * 10, "2" * 10, "3" * 10):
        talk.answer(question)
    assert model.prompts[2] == "<u>" + "2" * 10 + "<a>" + "b" * 10 + "<u>" + "3" * 10 + "<a>"
    assert "first 1 turn(s) were left out" in capsys.readouterr().err


def test_message_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="context has 60"):
        chat(Model("a", context=60), max_new_tokens=12).answer("x" * 60)


def test_sampling_overrides_the_models_config_for_the_call_only() -> None:
    model = Model("a")
    chat(model, sampling={"do_sample": True, "temperature": 0.5}, max_new_tokens=9).answer("x")
    used = model.configs[0]
    assert (used.do_sample, used.temperature, used.max_new_tokens, used.max_length) == (
        True,
        0.5,
        9,
        None,
    )
    assert used.pad_token_id == END
    assert not hasattr(model.generation_config, "temperature")


def test_long_prompts_only_are_computed_in_pieces() -> None:
    model = Model("a", "b")
    talk = chat(model, chunk_prefill_size=20)
    talk.answer("x")
    talk.answer("y" * 20)
    assert [getattr(config, "prefill_chunk_size", None) for config in model.configs] == [None, 20]


def test_thinking_is_forced(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("so.")
    chat(model, force_think=True).answer("why?")
    assert model.prompts[0].endswith("<a><think>\n")
    assert capsys.readouterr().out.startswith("<think>\nso.")


@pytest.mark.parametrize("opening", ["<think>\n", "<think>", "<think>\n\n"])
def test_thinking_is_not_forced_twice(opening: str) -> None:
    """Templates of models that always think begin the answer so themselves."""
    model = Model("so.", "so.")
    talk = chat(model, force_think=True)
    talk.tokenizer.chat_template = "{{ messages[-1].content }}<a>" + opening.replace(
        "\n", "{{ '\n' }}"
    )
    talk.answer("why?")
    assert model.prompts[0] == "why?<a>" + opening
    talk.tokenizer.chat_template = "<a><think></think>"
    talk.answer("why?")
    assert model.prompts[1] == "<a><think></think><think>\n"


def test_loop_answers_until_exit(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("one", "two")
    talk = chat(model)
    lines = iter(["first", "", "/help", "/clear", "second", "/exit", "never"])
    talk.loop(lambda _prompt: next(lines))
    assert model.prompts == ["<u>first<a>", "<u>second<a>"]
    assert "/exit leaves" in capsys.readouterr().err


def test_loop_ends_with_the_input_and_passes_ctrl_c_at_the_prompt() -> None:
    def ended(_prompt: str) -> str:
        raise EOFError

    def interrupted(_prompt: str) -> str:
        raise KeyboardInterrupt

    chat(Model()).loop(ended)
    with pytest.raises(KeyboardInterrupt):
        chat(Model()).loop(interrupted)


def test_empty_line_sends_the_prompt_file_and_a_file_name_its_text(tmp_path: Any) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("from a file")
    model = Model("a", "b")
    lines = iter(["", "/clear", str(path), "/exit"])
    chat(model).loop(lambda _prompt: next(lines), str(path))
    assert model.prompts == ["<u>from a file<a>"] * 2


def test_engine_line_counts_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = Model("a", "b")
    counters = Counters()
    model.hybrimoe = SimpleNamespace(stats=counters.snapshot, emulated=True)
    talk = chat(model, EngineReport(model))
    talk.answer("x")
    (
        counters.activations,
        counters.cache_hits,
        counters.experts_cpu,
        counters.experts_accelerator,
    ) = 8, 6, 3, 5
    counters.demand_loads, counters.prefetches, counters.prefetches_used = 1, 2, 1
    # Counted between two answers: loading and warm start belong to none.
    talk.answer("y")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("engine:")]
    assert (
        lines
        == [
            "engine: cache hits 0/0, experts on CPU 0 / accelerator 0 / transferred 0, "
            "prefetches used 0/0 [accelerator emulated]"
        ]
        * 2
    )


def test_engine_line_of_a_run() -> None:
    counters = Counters()
    report = EngineReport(
        SimpleNamespace(hybrimoe=SimpleNamespace(stats=counters.snapshot, emulated=False))
    )
    report()
    (
        counters.activations,
        counters.cache_hits,
        counters.experts_cpu,
        counters.experts_accelerator,
    ) = 8, 6, 3, 5
    counters.demand_loads, counters.fills, counters.prefetches, counters.prefetches_used = (
        1,
        1,
        2,
        1,
    )
    assert report() == (
        "engine: cache hits 6/8 (75.0%), experts on CPU 3 / accelerator 5 / transferred 4, "
        "prefetches used 1/2"
    )
