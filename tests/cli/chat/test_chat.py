"""The conversation: history, context, what is refused, and what is typed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripted_chat import END, Model, chat, converse

from hybrimoe_plugin.errors import BackendError, ConfigError


def test_history_goes_into_the_next_prompt() -> None:
    model = Model("Paris.", "2")
    talk = chat(model)
    talk.answer("capital?")
    talk.answer("1+1?")
    assert model.prompts == ["<u>capital?<a>", "<u>capital?<a>Paris.<u>1+1?<a>"]


def test_what_is_no_text_is_refused_and_the_chat_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Undecodable bytes are lone surrogates; in the C locale they may be UTF-8 nevertheless."""
    latin, utf8 = (
        b"gr\xfc\xdf".decode("utf-8", "surrogateescape"),
        "grüß".encode().decode("ascii", "surrogateescape"),
    )
    model = Model("a", "b")
    converse(model, latin, "\ud800", utf8, "\ufeffhello")
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
    talk = converse(model, "first", "second").chat
    out, err = capsys.readouterr()
    assert (
        "fine" in out and f"error: the answer could not be computed: {type(error).__name__}" in err
    )
    assert [message["content"] for message in talk.messages] == ["second", "fine"]


def test_long_conversation_loses_its_oldest_turns(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("a" * 10, "b" * 10, "c", context=60)
    talk = chat(model, max_new_tokens=12)
    for question in ("1" * 10, "2" * 10, "3" * 10):
        talk.answer(question)
    assert model.prompts[2] == "<u>" + "2" * 10 + "<a>" + "b" * 10 + "<u>" + "3" * 10 + "<a>"
    assert "first 1 turn(s) were left out of the prompt" in capsys.readouterr().err
    assert [each["content"][:1] for each in talk.messages] == ["1", "a", "2", "b", "3", "c"]


def test_as_few_turns_are_left_out_as_possible() -> None:
    model = Model("z", context=112)  # room for ten turns of 8 characters, and the answer
    talk = chat(model, max_new_tokens=20)
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for turns in (9, 10, 11, 12, 40):
        model.answers = ["z"]
        talk.replace("", turn * turns)
        talk.answer("last")
        assert model.prompts[-1] == "<u>x<a>y" * min(turns, 10) + "<u>last<a>"
        assert len(talk.messages) == 2 * turns + 2


def test_answers_longer_than_the_context_are_refused_before_any_message() -> None:
    with pytest.raises(ConfigError, match="answers may have 60 tokens, and .* context has 60"):
        chat(Model("a", context=60), max_new_tokens=60)


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
    """What is shown is kept, and sent with the next message."""
    model = Model("so.", "so.")
    talk = chat(model, force_think=True, stops=("think",))
    talk.answer("why?")
    assert model.prompts[0].endswith("<a><think>\n")
    assert capsys.readouterr().out == "<think>\nso.\n"
    assert talk.messages[1]["content"] == "<think>\nso."
    talk.answer("and?")
    assert model.prompts[1] == "<u>why?<a><think>\nso.<u>and?<a><think>\n"


@pytest.mark.parametrize("opening", ["<think>\n", "<think>", "<think>\n\n"])
def test_thinking_is_not_forced_twice(opening: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Templates of models that always think begin the answer so themselves."""
    model = Model("so.", "so.")
    talk = chat(model, force_think=True)
    talk.tokenizer.chat_template = "{{ messages[-1].content }}<a>" + opening.replace(
        "\n", "{{ '\n' }}"
    )
    talk.answer("why?")
    assert model.prompts[0] == "why?<a>" + opening
    assert capsys.readouterr().out == "so.\n"
    talk.tokenizer.chat_template = "<a><think></think>"
    talk.answer("why?")
    assert model.prompts[1] == "<a><think></think><think>\n"


def test_it_answers_until_exit(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("one", "two")
    converse(model, "first", "", "/help", "/clear", "second", "/exit", "never")
    assert model.prompts == ["<u>first<a>", "<u>second<a>"]
    assert "leave, as Ctrl-D does" in capsys.readouterr().err


def test_empty_line_sends_the_prompt_file_and_a_file_name_its_text(tmp_path: Any) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("from a file")
    model = Model("a", "b")
    converse(model, "", "/clear", str(path), prompt_file=str(path))
    assert model.prompts == ["<u>from a file<a>"] * 2


def test_a_message_that_is_too_long_costs_no_turn() -> None:
    model = Model("a", "b", context=60)
    talk = chat(model, max_new_tokens=12)
    talk.answer("one")
    with pytest.raises(ConfigError, match="context has 60"):
        talk.answer("x" * 60)
    assert [each["content"] for each in talk.messages] == ["one", "a"]


def test_the_system_prompt_is_first_and_stays_when_turns_are_left_out() -> None:
    model = Model("a" * 10, "b" * 10, "c", context=65)
    talk = chat(model, max_new_tokens=12)
    talk.system = "S"
    for question in ("1" * 10, "2" * 10, "3" * 10):
        talk.answer(question)
    assert model.prompts[2].startswith("<s>S<u>2222222222<a>")
