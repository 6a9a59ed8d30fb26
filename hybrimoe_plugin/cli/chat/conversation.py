"""A conversation with one model: history, answers, and what is printed after them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hybrimoe_plugin.cli.chat.answer import TimedStreamer, Timing
from hybrimoe_plugin.cli.chat.interrupts import Interrupts
from hybrimoe_plugin.cli.chat.options import ChatOptions as ChatOptions
from hybrimoe_plugin.cli.chat.options import check_length
from hybrimoe_plugin.cli.chat.progress import prompt_bar
from hybrimoe_plugin.cli.chat.prompt import Messages, Prompts
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.reading import well_formed
from hybrimoe_plugin.errors import ConfigError, HybriMoEError, not_computed
from hybrimoe_plugin.hosts.transformers.chat.kept_cache import KeptCache
from hybrimoe_plugin.hosts.transformers.chat.text import AnswerText
from hybrimoe_plugin.hosts.transformers.sampling import FlashinferSampling


class Chat:
    """Keeps the history and asks the model; transformers renders templates and samples.

    Answers go to stdout, everything else to stderr.

    Args:
        model: an injected (or any) transformers model with `generate`.
        tokenizer: with a chat template; without one, messages are joined as plain text.
        report: gives the engine's line for the answer just made, and resets itself.
        decoder: a custom decoding method for `generate` with an attribute `streamer`, or None.
        kept: keeps the KV cache from answer to answer; None computes every prompt anew.

    Raises:
        ConfigError: answers may be longer than the model's context.

    Attributes:
        system: the system prompt, "" for none.
        messages: questions and answers, in turn; also those that the context has no room for.
        timing: of the last answer; None before the first.
        interrupts: what Ctrl-C does.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: ChatOptions,
        report: Callable[[], str | None] = lambda: None,
        decoder: Any = None,
        kept: KeptCache | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.system = ""
        self.messages: Messages = []
        self.timing: Timing | None = None
        self.interrupts = Interrupts()
        self._report = report
        self._decoder = decoder
        self._kept = kept
        self._sampling = FlashinferSampling(model)
        self._prompts = Prompts(model, tokenizer)
        check_length(options.max_new_tokens, self.context)

    @property
    def context(self) -> int | None:
        """Tokens that the model can take; None where its config does not say."""
        return self._prompts.context

    def answer(self, content: str) -> bool:
        """Stream the answer to a message and print the counts and rates after it.

        Returns:
            False if Ctrl-C cut the answer short.

        Raises:
            ConfigError: message and answer are longer than the model's context, the message is not
                text, or the model's chat template or tokenizer refuses it.
            BackendError: a library failed while computing the answer.
            KeyboardInterrupt: Ctrl-C before the answer has begun.
        """
        question = {"role": "user", "content": well_formed(content)}
        # The history changes once there is an answer: after Ctrl-C or an error it is what it was.
        with self.interrupts.handled():
            messages = [*self.messages, question]
            text = self._ask(messages)
            self.messages = [*messages, {"role": "assistant", "content": text}]
            self._print_summary()
        return not self.interrupts.requested

    def retry(self) -> bool:
        """Answer the last message again, as `answer`.

        The former answer stays unless there is another whole one.

        Raises:
            ConfigError: there is no message.
        """
        if not self.messages:
            raise ConfigError("/retry: there is no answer yet: type a message")
        before = self.messages
        question = before[-2]["content"]
        with self.interrupts.handled():
            self.messages = before[:-2]
            whole = False
            try:
                whole = self.answer(question)
            finally:
                if not whole:
                    self.replace(self.system, before)
            if not whole:
                self._note("the former answer stays in the conversation")
        return whole

    def replace(self, system: str, messages: Messages) -> None:
        """Go on with another conversation."""
        self.system, self.messages = system, messages
        self.timing = None

    def clear(self) -> None:
        """Forget the conversation, but not the system prompt."""
        self.messages = []
        self.timing = None
        if self._kept is not None:
            self._kept.put_aside()

    def _ask(self, messages: Messages) -> str:
        """The answer to the last message."""
        timing = Timing()
        text = AnswerText(self.tokenizer, partial(_write, sys.stdout), self.options.stops)
        try:
            with self.interrupts.answering(lambda: timing.tokens > 0):
                prompt = self._prompts.fitting(self.system, messages, self.options)
                if prompt.left_out:
                    self._note(
                        "the conversation is longer than the model's context: its first "
                        f"{prompt.left_out} turn(s) were left out of the prompt"
                    )
                text.opening = prompt.opening
                self._generate(prompt.ids, text, timing)
        except KeyboardInterrupt:
            if not timing.tokens:
                raise
            self.interrupts.requested = True  # what was said is kept after a second Ctrl-C too
        finally:
            if timing.tokens:
                self.timing = timing
                text.end()
                _write(sys.stdout, "\n")
        return text.text

    def _generate(self, prompt: torch.Tensor, text: AnswerText, timing: Timing) -> None:
        """Stream the answer.

        Raises:
            BackendError: a library raised an error.
        """
        try:
            self._stream(prompt, text, timing)
        except (HybriMoEError, OSError):  # an OSError comes from the terminal
            raise
        except Exception as error:  # transformers, torch and kernels raise many kinds
            raise not_computed(error) from error

    @torch.no_grad()
    def _stream(self, prompt: torch.Tensor, text: AnswerText, timing: Timing) -> None:
        """Mutates: `text`, `timing`."""
        config = self._generation_config()
        ids = prompt[0].tolist()
        device = getattr(self.model, "device", prompt.device)
        self._report()
        cache = {} if self._kept is None else self._kept.arguments(ids, config)
        shared = 0 if self._kept is None else self._kept.shared
        new = len(ids) - shared
        with prompt_bar(new, not self.options.quiet) as bar:
            timing.prompt_tokens, timing.kept_tokens = new, shared
            streamer = TimedStreamer(timing, text, on_first=bar.close)
            self._compute_pieces(ids, new, config, bar.update if cache else None)
            output = self.model.generate(
                prompt.to(device),
                attention_mask=torch.ones_like(prompt).to(device),
                stopping_criteria=_criteria(lambda: self.interrupts.requested or text.stopped),
                **self._filtering(config),
                **self._decoding(prompt, streamer),
                **cache,
            )
        if self._kept is not None:
            self._kept.commit(output[0].tolist())

    def _compute_pieces(
        self, ids: list[int], new: int, config: Any, computed: Callable[[int], object] | None
    ) -> None:
        """Compute a long prompt but for its last piece, or let `generate` do so.

        Args:
            new: tokens to compute.
            config: of the call. Mutates.
            computed: is told each piece's tokens; None where no cache is kept.
        """
        piece = self.options.chunk_prefill_size
        if piece is None or new <= piece:
            return
        if self._kept is not None and computed is not None:
            self._kept.compute(ids, piece, computed)
        else:
            config.prefill_chunk_size = piece

    def _filtering(self, config: Any) -> dict[str, Any]:
        """Arguments of `generate` for sampling; custom decoding methods sample by themselves."""
        if self._decoder is not None or self.options.sampler != "auto":
            return {"generation_config": config}
        return self._sampling.arguments(config)

    def _decoding(self, prompt: torch.Tensor, streamer: TimedStreamer) -> dict[str, Any]:
        """Arguments of `generate` for streaming.

        A custom decoding method gets no streamer from `generate`, and the streamer no prompt.
        """
        if self._decoder is None:
            return {"streamer": streamer}
        self._decoder.streamer = streamer
        streamer.put(prompt)
        return {"custom_generate": self._decoder}

    def _generation_config(self) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        changes = self.options.sampling or {}
        for name, value in changes.items():
            setattr(config, name, value)
        config.max_new_tokens = self.options.max_new_tokens
        config.max_length = None
        if config.pad_token_id is None:
            end = config.eos_token_id
            config.pad_token_id = end[0] if isinstance(end, list) else end
        return config

    def _print_summary(self) -> None:
        if self.interrupts.requested:
            self._note("stopped")
        if self.options.quiet or self.timing is None:
            return
        engine = self._report()
        lines = ["", *self.timing.lines(), *([engine] if engine else []), ""]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _note(self, text: str) -> None:
        if not self.options.quiet:
            notice(text)


def _write(stream: Any, text: str) -> None:
    print(text, end="", file=stream, flush=True)


def _criteria(has_stopped: Callable[[], bool]) -> Any:
    from transformers import StoppingCriteriaList

    def stopped(ids: torch.Tensor, _scores: object, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), has_stopped(), device=ids.device, dtype=torch.bool)

    return StoppingCriteriaList([stopped])
