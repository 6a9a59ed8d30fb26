"""Answers under a grammar follow it and end, whatever a model computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hybrimoe_plugin.serve.requests import Request, Sampling
from hybrimoe_plugin.serve.sampling import Drawn, GrammarError, Sampler, draw
from hybrimoe_plugin.serve.sampling.grammar import Grammar, compile_grammar, convert

from .vocabularies import END, byte_level, model_of, sentence_piece

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "s": {"type": "string", "maxLength": 4},
        "b": {"type": "boolean"},
        "e": {"enum": ["x", "yé"]},
    },
    "required": ["n", "s", "b", "e"],
    "additionalProperties": False,
}
PADDING = 7
"""Logits that a model has beyond its tokenizer's ids."""


@pytest.fixture(scope="module", params=[byte_level, sentence_piece])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    make: Callable[[], Any] = request.param
    return make()


def answer(
    tokenizer: Any, grammar: Grammar, seed: int, ends: Any = END, steps: int = 600, **sampling: Any
) -> tuple[list[int], bool]:
    """Tokens that random logits give, and whether the answer came to its end."""
    size = len(tokenizer) + PADDING
    request = Request("r", (2,), sampling=Sampling(seed=seed, grammar=grammar, **sampling))
    sampler = Sampler(model_of(size, ends), request)
    random = torch.Generator().manual_seed(seed)
    kept = []
    for _ in range(steps):
        logits = torch.randn(1, size, generator=random) * 3
        logits[0, -PADDING:] = 50.0
        (found,) = draw([sampler], logits)
        assert isinstance(found, Drawn), found
        if found.kept:
            kept.append(found.token.id)
        if found.last:
            return kept, True
    return kept, False


@pytest.mark.parametrize("seed", range(12))
def test_a_random_model_writes_json_that_fits_the_schema(tokenizer: Any, seed: int) -> None:
    grammar = compile_grammar("json_schema", SCHEMA, tokenizer)
    ids, ended = answer(tokenizer, grammar, seed)
    assert ended
    found = json.loads(tokenizer.decode(ids))
    assert sorted(found) == ["b", "e", "n", "s"]
    assert type(found["n"]) is int and 0 <= found["n"] <= 99
    assert isinstance(found["s"], str) and len(found["s"]) <= 4
    assert type(found["b"]) is bool and found["e"] in ("x", "yé")


@pytest.mark.parametrize("ends", [END, [END, 0], None])
def test_it_ends_whichever_tokens_end_a_text(tokenizer: Any, ends: Any) -> None:
    grammar = compile_grammar("json_schema", SCHEMA, tokenizer)
    ids, ended = answer(tokenizer, grammar, 1, ends)
    assert ended and json.loads(tokenizer.decode(ids))


def test_least_tokens_do_not_hinder_a_complete_grammar(tokenizer: Any) -> None:
    grammar = compile_grammar("choice", ["a", ""], tokenizer)
    for seed in range(8):
        ids, ended = answer(tokenizer, grammar, seed, min_tokens=50)
        assert ended and tokenizer.decode(ids) in ("a", "")


ODD = ['say "a"', "back\\slash", "new\nline", "é🙂", "/x/", "a|b", "\u2028", "<s", "'", "%json"]


@pytest.mark.parametrize("text", ODD)
def test_a_choice_is_written_as_it_is(tokenizer: Any, text: str) -> None:
    ids, ended = answer(tokenizer, compile_grammar("choice", [text], tokenizer), 0)
    assert ended and tokenizer.decode(ids) == text


def test_a_control_token_is_not_written_out(tokenizer: Any) -> None:
    """llguidance takes a forced text that looks like one for it: the answer fails, typed."""
    grammar = compile_grammar("choice", ["<s>"], tokenizer)
    size = len(tokenizer)
    sampler = Sampler(model_of(size), Request("r", (2,), sampling=Sampling(grammar=grammar)))
    (found,) = draw([sampler], torch.zeros(1, size))
    assert isinstance(found, (Drawn, GrammarError))


@pytest.mark.parametrize(
    ("kind", "spec", "pattern"),
    [
        ("regex", "[ab]{2,3}c?", "[ab]{2,3}c?"),
        ("lark", 'start: "x" y\ny: /[0-9]{1,3}/', "x[0-9]{1,3}"),
        ("ebnf", 'root ::= "x" y\ny ::= [0-9] [0-9]?', "x[0-9]{1,2}"),
        ("json_object", None, r"(?s)\{.*"),
    ],
)
def test_other_kinds(tokenizer: Any, kind: str, spec: Any, pattern: str) -> None:
    ids, _ = answer(tokenizer, compile_grammar(kind, spec, tokenizer), 3)
    assert re.fullmatch(pattern, tokenizer.decode(ids))


def test_a_vocabulary_smaller_than_the_tokenizers(tokenizer: Any) -> None:
    matcher = compile_grammar("regex", "a", tokenizer).matcher()
    assert matcher.allowed(5, frozenset({1, 9})).shape == (5,)


def test_answers_of_one_grammar_do_not_meet(tokenizer: Any) -> None:
    grammar = compile_grammar("regex", "ab", tokenizer)
    one, other = grammar.matcher(), grammar.matcher()
    size = len(tokenizer)
    before = other.allowed(size, frozenset())
    one.take(tokenizer.convert_tokens_to_ids("a"))
    assert torch.equal(other.allowed(size, frozenset()), before)
    assert not torch.equal(one.allowed(size, frozenset()), before)


def test_a_token_that_is_not_allowed_is_an_error(tokenizer: Any) -> None:
    matcher = compile_grammar("regex", "ab", tokenizer).matcher()
    with pytest.raises(GrammarError, match="cannot be followed"):
        matcher.take(tokenizer.convert_tokens_to_ids("b"))
    with pytest.raises(GrammarError):
        matcher.allowed(10, frozenset())


def test_a_tokenizer_is_converted_once(tokenizer: Any) -> None:
    assert convert(tokenizer) is convert(tokenizer)


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    with pytest.raises(GrammarError, match="tokenizer"):
        compile_grammar("regex", "a", tiny)


def test_a_tokenizer_out_of_a_gguf_file(tmp_path: Path) -> None:
    from hybrimoe_plugin.hosts.transformers.tokenizer import load_tokenizer
    from hybrimoe_plugin.weights.gguf_store import GGUFStore

    made = byte_level()
    tokens = made.convert_ids_to_tokens(range(len(made)))
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["t r", "u e", "tr ue"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": END,
    }
    path = tiny.write(tmp_path, "mixtral", changes={"vocab_size": len(tokens)}, extra=keys)
    tokenizer = load_tokenizer(None, GGUFStore.open(path))
    ids, ended = answer(tokenizer, compile_grammar("json_schema", SCHEMA, tokenizer), 4)
    assert ended and json.loads(tokenizer.decode(ids))
