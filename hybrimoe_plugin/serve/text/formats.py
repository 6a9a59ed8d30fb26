"""How a model marks its reasoning and its tool calls, as transformers describes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe_plugin.serve.text.parts import Marked

log = logging.getLogger(__name__)

_THINKING = {
    "defaults": {"role": "assistant"},
    "start_anchor_pattern": r"(?=<think>\s*\Z)",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "content": {"content": "text"},
    },
}
"""For models of which only the signs of reasoning are known, by their chat template."""
_LONGEST_OPENING = 1 << 16
"""Characters of a prompt's end in which the beginning of the answer is looked for."""


@dataclass(frozen=True)
class Format:
    """The signs in a model's answers.

    Attributes:
        template: transformers' `ResponseTemplate`.
        without_calls: the same, where nothing may be called: the signs of a call are text.
        has_tool_calls: whether tool calls are among the signs.
        hidden: special tokens that are none of the signs.
    """

    template: Any
    without_calls: Any
    has_tool_calls: bool
    hidden: frozenset[int]

    def parts(
        self,
        prompt: str,
        tools: Sequence[Mapping[str, Any]] | None,
        most_calls: int | None = None,
    ) -> Marked:
        """What divides an answer to this prompt.

        Args:
            tools: by whose schemas arguments that are written as text become numbers; None where
                nothing may be called.
            most_calls: later ones are left out.
        """
        end = prompt[-_LONGEST_OPENING:]
        # Without the sign, transformers would take the whole prompt for the answer's beginning.
        opening = end if self.template.start_anchor_re.search(end) else ""
        held = _held(self._parser(opening, tools))
        return Marked(self._parser(opening, tools), held, most_calls)

    def _parser(self, opening: str, tools: Sequence[Mapping[str, Any]] | None) -> Any:
        from transformers.utils.chat_parsing import ResponseParser

        if tools is None:
            return ResponseParser(self.without_calls, prefix=opening)
        return ResponseParser(self.template, prefix=opening, tools=list(tools))


def _held(parser: Any) -> str:
    """The end of the prompt that a parser holds back: it will tell it as if it were the answer's.

    Found by ending a parser that is not used otherwise.
    """
    try:
        _, events = parser.finalize()
    except Exception:  # within a call, say
        return ""
    return "".join(event["text"] for event in events if event["type"] == "region_chunk")


def format_of(model: Any, tokenizer: Any, chat_template: str) -> Format | None:
    """The format of a model's answers; None where nothing is known: then all is plain text.

    Args:
        chat_template: the template's source.
    """
    try:
        from transformers.cli.serving.utils import get_response_template
        from transformers.utils.chat_parsing.response_templates import load_response_template
    except ImportError as error:
        log.warning(
            "reasoning and tool calls are not told apart from text: this release of transformers "
            "describes no model's answers (%s)",
            error,
        )
        return None
    try:
        described = get_response_template(tokenizer, model)
        if described is None:
            described = _THINKING if "</think>" in chat_template else None
        if described is None:
            return None
        template = load_response_template(described)
        fields = {**described["fields"]}
        has_tool_calls = fields.pop("tool_calls", None) is not None
        without_calls = load_response_template({**described, "fields": fields})
    except Exception as error:  # a tokenizer's files may hold anything
        log.warning("the model's response template cannot be used: %s", error)
        return None
    return Format(template, without_calls, has_tool_calls, _hidden(tokenizer, described))


def _hidden(tokenizer: Any, described: Any) -> frozenset[int]:
    # In patterns, signs are escaped.
    signs = [text.replace("\\", "") for text in _texts(described)]
    return frozenset(
        index
        for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token.special and not any(token.content in text for text in signs)
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(child)
