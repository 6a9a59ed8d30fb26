"""How a model marks its reasoning and its tool calls, as transformers describes it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    def parser(self, prompt: str, tools: Sequence[Mapping[str, Any]] | None) -> Any:
        """A `ResponseParser` for an answer, which has read the answer's beginning in the prompt.

        Args:
            tools: by whose schemas arguments that are written as text become numbers; None where
                nothing may be called.
        """
        from transformers.utils.chat_parsing import ResponseParser

        end = prompt[-_LONGEST_OPENING:]
        # Without the sign, transformers would take the whole prompt for the answer's beginning.
        opening = end if self.template.start_anchor_re.search(end) else ""
        if tools is None:
            return ResponseParser(self.without_calls, prefix=opening)
        try:
            return ResponseParser(self.template, prefix=opening, tools=list(tools))
        except TypeError:  # older releases know no schemas
            return ResponseParser(self.template, prefix=opening)


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
    signs = json.dumps(described, ensure_ascii=False).replace("\\\\", "\\")
    return frozenset(
        index
        for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token.special and token.content not in signs and re.escape(token.content) not in signs
    )
