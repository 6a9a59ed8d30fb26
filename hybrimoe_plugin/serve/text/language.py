"""What a model reads and writes: its prompts, and the signs in its answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.serve.requests import PromptError, Request, Sampling
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.asking import Question
from hybrimoe_plugin.serve.text.formats import Format, format_of
from hybrimoe_plugin.serve.text.parts import ListedCalls, NamedCall, Parts, Plain
from hybrimoe_plugin.serve.text.prompts import Prompt, Prompts
from hybrimoe_plugin.serve.text.spelling import Spelling
from hybrimoe_plugin.serve.text.tools import Tools


@dataclass(frozen=True)
class Wanted:
    """How an HTTP request wants its answers, whichever API it came by.

    Attributes:
        max_tokens: None for as many as the context has room for.
        choices: answers to each prompt. With a seed, each has its own: seed, seed + 1, ...
        stops: strings that end an answer.
        keep_stop: whether it ends behind them instead of before them.
        skip_special_tokens: whether tokens that control the model have no text.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    choices: int = 1
    stops: tuple[str, ...] = ()
    keep_stop: bool = False
    skip_special_tokens: bool = True


class Language:
    """Prompts and answers of one model. `Language.of(service)` gives the service's own.

    Attributes:
        format: None where the model's answers are plain text.
        spelling: text and bytes of single tokens.
    """

    def __init__(self, service: Service) -> None:
        self.prompts = Prompts(service.model, service.tokenizer)
        self.spelling = Spelling(service.tokenizer)
        try:
            self.template = self.prompts.template
        except ConfigError:  # several and no default: told when a conversation comes
            self.template = ""
        self.format: Format | None = format_of(service.model, service.tokenizer, self.template)

    @classmethod
    def of(cls, service: Service) -> Language:
        """The service's, made now if it is not there yet."""
        if service.language is None:
            service.language = cls(service)
        found: Language = service.language
        return found

    def check_tools(self, tools: Tools) -> None:
        """Refuse functions that the model would not see, or whose calls cannot be read.

        Raises:
            PromptError: it says which.
        """
        if not tools.may_be_called:
            return
        if "tools" not in self.template:
            raise PromptError("the model's chat template knows no tools")
        has_format = self.format is not None and self.format.has_tool_calls
        if not has_format and not tools.must_be_called:
            raise PromptError(
                "it is not known how this model writes tool calls: give tool_choice `none`, "
                "`required`, or the name of a function"
            )

    def questions(
        self,
        id: str,
        prompt: Prompt,
        wanted: Wanted,
        tools: Tools | None = None,
        plain: bool = False,
    ) -> list[Question]:
        """The answers to ask for, one for each choice.

        Args:
            id: of the HTTP request.
            tools: what may be called in a conversation.
            plain: the text is not divided: it is no conversation, or a grammar has the answer be
                content alone.
        """
        found = []
        for choice in range(wanted.choices):
            request = Request(
                f"{id}-{choice}", prompt.ids, wanted.max_tokens, _seeded(wanted, choice)
            )
            parts, hidden = self._parts(prompt, tools or Tools(), plain)
            skips = wanted.skip_special_tokens
            if hidden is None:
                found.append(Question(request, parts, wanted.stops, wanted.keep_stop, skips))
                continue
            # Signs may be special tokens: the tokenizer leaves none out, the others are hidden.
            hidden = hidden if skips else frozenset()
            question = Question(request, parts, wanted.stops, wanted.keep_stop, False, hidden)
            found.append(question)
        return found

    def _parts(
        self, prompt: Prompt, tools: Tools, plain: bool
    ) -> tuple[Parts, frozenset[int] | None]:
        """What divides an answer, and the tokens to hide; None for all special tokens."""
        if tools.must_be_called:
            return (NamedCall(tools.choice) if tools.named else ListedCalls()), None
        if plain or self.format is None:
            return Plain(), None
        functions = tools.functions if tools.may_be_called else None
        most_calls = None if tools.parallel else 1
        return self.format.parts(prompt.text or "", functions, most_calls), self.format.hidden


def _seeded(wanted: Wanted, choice: int) -> Sampling:
    seed = wanted.sampling.seed
    if seed is None or choice == 0:
        return wanted.sampling
    return replace(wanted.sampling, seed=(seed + choice) % 2**63)
