"""Streamer and stopping criterion of the conversation work with transformers' `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_thread import one_torch_thread
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybrimoe_plugin.cli.chat.conversation import Chat
from hybrimoe_plugin.cli.chat.options import ChatOptions
from hybrimoe_plugin.hosts.transformers.chat.kept_cache import KeptCache

__all__ = ["one_torch_thread"]  # a fixture of this module

WORDS = ("end", "user", "assistant", *(f"w{index}" for index in range(61)))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="end"))
    inner.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="end")
    made.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": len(WORDS),
    }
    made = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=0, bos_token_id=None)
    ).eval()
    made.generation_config.eos_token_id = None
    return made


def test_greedy_answer_is_that_of_generate(
    model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ChatOptions(max_new_tokens=6, sampling={"do_sample": False})
    talk = Chat(model, tokenizer, options)
    assert talk.answer("w1 w2 w3")
    prompt = tokenizer("user w1 w2 w3 assistant", return_tensors="pt").input_ids
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 5:]
    out, err = capsys.readouterr()
    assert out.strip() == tokenizer.decode(expected)
    assert "prompt eval count:    5 token(s)" in err
    assert "eval count:           5 token(s)" in err


def test_prompt_in_pieces_gives_the_same_answer(model: Any, tokenizer: Any) -> None:
    answers = []
    for chunk in (None, 2):
        options = ChatOptions(
            max_new_tokens=6, sampling={"do_sample": False}, chunk_prefill_size=chunk
        )
        talk = Chat(model, tokenizer, options)
        talk.answer("w1 w2 w3 w4")
        answers.append(talk.messages[-1]["content"])
    assert answers[0] == answers[1]


def test_a_kept_cache_changes_counts_and_no_answer(model: Any, tokenizer: Any) -> None:
    """With prompts in pieces, an answer that was cut off by a stop string, and a second try."""
    said = []
    for kept in (None, KeptCache(model)):
        options = ChatOptions(
            max_new_tokens=6,
            sampling={"do_sample": False},
            chunk_prefill_size=3,
            stops=["w33"],
        )
        talk = Chat(model, tokenizer, options, kept=kept)
        for question in ("w1 w2 w3 w4", "w5 w6 w7 w8 w9"):
            talk.answer(question)
        talk.retry()
        said.append(talk.messages)
        assert talk.timing is not None
        assert (talk.timing.kept_tokens > 0) == (kept is not None)
        assert (talk.timing.prompt_tokens == 1) == (kept is not None)
    assert said[0] == said[1]


def test_stop_ends_the_answer_at_the_next_token(model: Any, tokenizer: Any) -> None:
    talk = Chat(model, tokenizer, ChatOptions(max_new_tokens=6, sampling={"do_sample": False}))
    write = talk.tokenizer.decode
    decoded: list[Any] = []

    def decode(ids: Any, **options: Any) -> str:
        decoded.append(ids)
        talk.interrupts.requested = len(decoded) >= 4
        return str(write(ids, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(talk.tokenizer, "decode", decode)
        assert talk.answer("w1") is False
    # `generate` asks the criterion before it hands a token over: the one after the request is the
    # last.
    assert talk.timing is not None and talk.timing.tokens == 3
