"""Answers that follow a grammar, by llguidance: JSON schemas, regular expressions and others.

    compile_grammar -> Grammar   shared by any number of answers, never changed
    Grammar.matcher -> Matcher   of one answer: which tokens may come next

Grammars come from strangers. llguidance limits the work of compiling one and of each step; sizes
are limited here before it is called.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hybrimoe_plugin.serve.sampling.errors import GrammarError

MOST_BYTES = 64 << 10
"""Of a grammar's text, as JSON for a schema or a choice."""
MOST_LEVELS = 64
"""Of a schema: objects and lists within each other. Of a grammar's text: brackets."""

KINDS = ("json_object", "json_schema", "regex", "choice", "lark", "ebnf")

_BLANKS = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between JSON's signs. Without a bound, a model may write blanks until the context is full."""


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar. Any number of threads may use it.

    Attributes:
        kind: one of `KINDS`.
        tokenizer: llguidance's form of the tokenizer that it was compiled for.
    """

    kind: str
    tokenizer: Any
    _start: Any
    """llguidance's matcher of an empty answer. It is copied, and never used itself."""

    def matcher(self) -> Matcher:
        """For one answer, which is empty yet."""
        return Matcher(self._start.deep_copy(), self.tokenizer.eos_tokens)


class Matcher:
    """Which tokens may come next in one answer."""

    def __init__(self, matcher: Any, tokenizer_ends: Iterable[int]) -> None:
        self._matcher = matcher
        self._tokenizer_ends = frozenset(tokenizer_ends)

    def allowed(self, vocabulary: int, ends: frozenset[int]) -> torch.Tensor:
        """What may come next: [vocabulary] bool. Changes nothing.

        Args:
            vocabulary: of the model. Ids that the tokenizer does not have are not allowed.
            ends: tokens that end the answer: allowed where it is complete.

        Raises:
            GrammarError: to find it out takes too much work.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        known = np.unpackbits(bits, bitorder="little")[:vocabulary]
        allowed = torch.zeros(vocabulary, dtype=torch.bool)
        allowed[: len(known)] = torch.from_numpy(known).bool()
        # Which tokens end a text is the model's to say, not the tokenizer's.
        allowed[_inside(self._tokenizer_ends - ends, vocabulary)] = False
        if self._matcher.is_accepting():
            allowed[_inside(ends, vocabulary)] = True
        return allowed

    def take(self, token: int) -> bool:
        """Go on with a token; whether the text is complete and nothing can follow.

        Raises:
            GrammarError: the token is not allowed, or takes too much work. No call works then.
        """
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_first_line(self._matcher)}")


def compile_grammar(kind: str, spec: Any, tokenizer: Any) -> Grammar:
    """Compile a grammar. Takes up to seconds; other Python threads run meanwhile.

    The first call with a tokenizer converts it; better call `convert` before, when a server starts.

    Args:
        kind: one of `KINDS`.
        spec: nothing for `json_object`, a dict or its text for `json_schema`, a list of strings
            for `choice`, else the text of the grammar; `ebnf` is llama.cpp's GBNF, or Lark.
        tokenizer: a fast tokenizer of transformers.

    Raises:
        GrammarError: the grammar is wrong, too large, or asks for what llguidance lacks.
    """
    from llguidance import LLMatcher, LLParserLimits

    if kind not in KINDS:
        raise GrammarError(f"grammar kind {kind!r:.80} is unknown; known are {', '.join(KINDS)}")
    converted = convert(tokenizer)
    try:
        text = _grammar_text(kind, spec)
    except GrammarError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise GrammarError(f"{kind} cannot be read: {error!s:.300}") from error
    start = LLMatcher(converted, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if start.is_error():
        raise GrammarError(f"{kind} cannot be compiled: {_first_line(start)}")
    # Copies share what the lexer has learnt: the slow first step is done here, not while others
    # wait for their tokens.
    first = start.deep_copy()
    nothing = not any(first.compute_bitmask())
    if first.is_error() or nothing:
        raise GrammarError(f"{kind} allows no text, or is too complex: {_first_line(first)}")
    return Grammar(kind, converted, start)


@functools.lru_cache(maxsize=4)
def convert(tokenizer: Any) -> Any:
    """llguidance's form of a tokenizer; kept, so that a second call costs nothing.

    Takes a second for 50,000 tokens, in which no other Python thread runs.

    Raises:
        GrammarError: llguidance cannot read this kind of tokenizer.
    """
    from llguidance.hf import from_tokenizer

    try:
        # Texts end where the model says so; llguidance needs a token for it all the same.
        end = tokenizer.eos_token_id
        return from_tokenizer(tokenizer, eos_token=0 if end is None else end)
    except (AttributeError, ValueError, TypeError) as error:
        raise GrammarError(
            f"grammars do not work with this model's tokenizer: {error!s:.300}"
        ) from error


def _grammar_text(kind: str, spec: Any) -> str:
    """What llguidance compiles. Raises: ValueError, TypeError: the spec is malformed."""
    from llguidance import LLMatcher, grammar_from

    if kind in ("json_object", "json_schema"):
        schema = {"type": "object"} if kind == "json_object" else spec
        if isinstance(schema, str):
            _check_size(schema)
            schema = json.loads(schema)
        if not isinstance(schema, dict):
            raise TypeError("a schema is a JSON object")
        _check_levels(schema)
        written = json.dumps(schema)
        _check_size(written)
        rules: Any = {"whitespace_flexible": True, "whitespace_pattern": _BLANKS}
        return str(LLMatcher.grammar_from_json_schema(written, overrides=rules))
    if kind == "choice":
        return str(LLMatcher.grammar_from_lark(_choice(spec)))
    if not isinstance(spec, str):
        raise TypeError("a string is expected")
    _check_size(spec)
    _check_brackets(spec)
    known: Any = kind
    return str(grammar_from(known, spec))


def _choice(texts: Any) -> str:
    """Lark that allows one of these texts."""
    if not isinstance(texts, (list, tuple)) or not texts:
        raise TypeError("a list of strings is expected, with one at least")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a choice is among strings")
    written = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    _check_size(written)
    return f"start: {written}"


def _check_size(text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise GrammarError("the grammar has half of a surrogate pair, which is no text") from None
    if size > MOST_BYTES:
        raise GrammarError(f"the grammar has {size} bytes; at most {MOST_BYTES} are allowed")


def _check_levels(schema: Any) -> None:
    """Refuse deep nesting, without going deep itself."""
    level = [schema]
    for _ in range(MOST_LEVELS):
        parts = [part for part in level if isinstance(part, (dict, list))]
        level = [
            inner for part in parts for inner in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return
    raise GrammarError(f"the schema is nested deeper than {MOST_LEVELS} levels")


def _check_brackets(text: str) -> None:
    """Refuse deep nesting; brackets within strings count as well."""
    depth = 0
    for sign in text:
        depth = depth + 1 if sign in "([{" else max(0, depth - 1) if sign in ")]}" else depth
        if depth > MOST_LEVELS:
            raise GrammarError(f"the grammar is nested deeper than {MOST_LEVELS} levels")


def _inside(tokens: Iterable[int], vocabulary: int) -> list[int]:
    return [token for token in tokens if token < vocabulary]


def _first_line(matcher: Any) -> str:
    """llguidance's message, without the parser's state."""
    return str(matcher.get_error()).split("\n<")[0].strip()[:300] or "no reason given"
