"""A conversation with one model: history, answers, and what is printed after them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hybrimoe_plugin.cli.answer import Stop, TimedStreamer, Timing
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.reading import is_file, read_message, read_prompt_file, well_formed
from hybrimoe_plugin.errors import BackendError, ConfigError, HybriMoEError
from hybrimoe_plugin.hosts.transformers.sampling import FlashinferSampling
from hybrimoe_plugin.hosts.transformers.template import ChatTemplate

log = logging.getLogger(__name__)

HELP = (
    '/exit leaves, /clear forgets the conversation, """ begins and ends several lines, a file '
    "name sends the file"
)
THINK = "<think>\n"


@dataclass(frozen=True)
class ChatOptions:
    """How answers are made.

    Attributes:
        max_new_tokens: longest answer.
        sampling: overrides of the model's generation config, such as `do_sample` and `temperature`.
        force_think: begin every answer with `<think>`.
        chunk_prefill_size: prompts longer than this are computed in pieces.
        sampler: `auto` lets flashinfer filter tokens where it is faster, `transformers` leaves that
            to transformers.
    """

    max_new_tokens: int = 300
    sampling: Mapping[str, Any] | None = None
    force_think: bool = False
    chunk_prefill_size: int | None = None
    sampler: str = "auto"


class Chat:
    """Keeps the history and asks the model; templates, sampling and streaming are transformers'.

    Args:
        model: an injected (or any) transformers model with `generate`.
        tokenizer: with a chat template; without one, messages are joined as plain text.
        report: gives the engine's line for the answer that was just made, and resets itself.
        decoder: a custom decoding method of `generate` with an attribute `streamer`, or None.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: ChatOptions,
        report: Callable[[], str | None] = lambda: None,
        decoder: Any = None,
    ) -> None:
        from transformers import TextStreamer

        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.messages: list[dict[str, str]] = []
        self._report = report
        self._decoder = decoder
        self._sampling = FlashinferSampling(model)
        self._template = ChatTemplate(tokenizer)
        self._streamer = TimedStreamer(
            TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        )
        self._stop = Stop(lambda: self._streamer.timing.first_s is not None)

    def answer(self, content: str) -> bool:
        """Stream the answer to a message and print the counts and rates after it.

        Returns:
            False if Ctrl-C cut the answer short.

        Raises:
            ConfigError: message and answer are longer than the model's context, the message is no
                text, or the model's chat template or tokenizer refuses it.
            BackendError: a library failed while it computed the answer.
        """
        self.messages.append({"role": "user", "content": well_formed(content)})
        try:
            prompt = self._fitting_prompt()
            text = self._generate(prompt)
        except BaseException:
            # Ctrl-C before an answer, or an error: the history must not hold a question without
            # one.
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": text})
        self._print_summary(self._streamer.timing)
        return not self._stop.requested

    def loop(self, read: Callable[[str], str] = input, prompt_file: str | None = None) -> None:
        """Read and answer messages until /exit or the end of the input."""
        while True:
            try:
                content = read_message(read)
            except EOFError:
                print()
                return
            if content.strip() in ("/exit", "/quit"):
                return
            try:
                self._turn(content, prompt_file)
            except HybriMoEError as error:
                notice(f"error: {error}")
                log.info("in detail", exc_info=error)
            except KeyboardInterrupt:
                print()
                notice("stopped")

    def _turn(self, content: str, prompt_file: str | None) -> None:
        command = content.strip()
        if command == "/clear":
            self.messages.clear()
        elif command == "/help":
            notice(HELP)
        elif not command:
            # kTransformers sends the prompt file when the line is empty.
            if prompt_file is None:
                notice(f"type a message; {HELP}")
            else:
                self.answer(read_prompt_file(prompt_file))
        else:
            self.answer(read_prompt_file(command) if is_file(content) else content)

    def _fitting_prompt(self) -> torch.Tensor:
        """[1, T] ids of the conversation, without its oldest turns where it is longer than the
        model's context.
        """
        context = getattr(self.model.config, "max_position_embeddings", None)
        dropped = 0
        while True:
            prompt = self._encode()
            needed = prompt.shape[1] + self.options.max_new_tokens
            if context is None or needed <= context:
                break
            if len(self.messages) <= 2:
                raise ConfigError(
                    f"it has {prompt.shape[1]} tokens, the answer may have "
                    f"{self.options.max_new_tokens}, "
                    f"the model's context has {context}: shorten it or give a smaller "
                    f"--max_new_tokens"
                )
            del self.messages[:2]
            dropped += 1
        if dropped:
            notice(
                f"the conversation is longer than the model's context: its first {dropped} "
                f"turn(s) were left out"
            )
        return prompt

    def _encode(self) -> torch.Tensor:
        if self._template.exists:
            text, special = self._template.render(self.messages), False
        else:
            text, special = "\n".join(message["content"] for message in self.messages), True
        # Templates of models that always think open the answer so themselves.
        if self.options.force_think and not text.rstrip().endswith(THINK.strip()):
            text += THINK
        try:
            ids = self.tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids
        except Exception as error:  # tokenizers raise many kinds
            raise ConfigError(
                f"the tokenizer cannot read the prompt ({type(error).__name__}: {error})"
            ) from error
        assert isinstance(ids, torch.Tensor)
        if ids.shape[1] == 0:
            raise ConfigError("the message has no tokens")
        self._check_known(ids)
        return ids

    def _check_known(self, ids: torch.Tensor) -> None:
        """Raise ConfigError for ids beyond the model's embedding, which native code would read past
        its end.
        """
        table = getattr(self.model, "get_input_embeddings", lambda: None)()
        rows = getattr(table, "num_embeddings", None)
        largest = int(ids.max())
        if rows is not None and largest >= rows:
            raise ConfigError(
                f"the tokenizer gives token {largest} ({self.tokenizer.decode([largest])!r}), and "
                f"the model's "
                f"embedding has {rows} rows: the tokenizer is another model's"
            )

    def _generate(self, prompt: torch.Tensor) -> str:
        """The answer, streamed.

        Raises:
            BackendError: what a library raised.
        """
        try:
            return self._stream(prompt)
        except (HybriMoEError, OSError):  # an OSError is the terminal's
            raise
        except Exception as error:  # transformers, torch and kernels raise many kinds
            raise BackendError(
                f"the answer could not be computed: {type(error).__name__}: {error}"
            ) from error

    @torch.no_grad()
    def _stream(self, prompt: torch.Tensor) -> str:
        config = self._generation_config(prompt.shape[1])
        device = getattr(self.model, "device", prompt.device)
        if self.options.force_think:
            print(THINK, end="", flush=True)
        self._report()
        self._streamer.start(prompt.shape[1])
        try:
            with self._stop.listening():
                self.model.generate(
                    prompt.to(device),
                    attention_mask=torch.ones_like(prompt).to(device),
                    stopping_criteria=_criteria(self._stop),
                    **self._filtering(config),
                    **self._decoding(prompt),
                )
        finally:
            self._streamer.close()
        text = self.tokenizer.decode(self._streamer.timing.ids, skip_special_tokens=True)
        return str(text)

    def _filtering(self, config: Any) -> dict[str, Any]:
        """How `generate` shall draw; custom decoding methods draw by themselves."""
        if self._decoder is not None or self.options.sampler != "auto":
            return {"generation_config": config}
        return self._sampling.arguments(config)

    def _decoding(self, prompt: torch.Tensor) -> dict[str, Any]:
        """How `generate` shall stream; it shows custom decoding methods neither the streamer nor it
        the prompt.
        """
        if self._decoder is None:
            return {"streamer": self._streamer}
        self._decoder.streamer = self._streamer
        self._streamer.put(prompt)
        return {"custom_generate": self._decoder}

    def _generation_config(self, prompt_tokens: int) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        for name, value in (self.options.sampling or {}).items():
            setattr(config, name, value)
        config.max_new_tokens = self.options.max_new_tokens
        config.max_length = None
        if config.pad_token_id is None:
            end = config.eos_token_id
            config.pad_token_id = end[0] if isinstance(end, list) else end
        chunk = self.options.chunk_prefill_size
        if chunk is not None and prompt_tokens > chunk:
            config.prefill_chunk_size = chunk
        return config

    def _print_summary(self, timing: Timing) -> None:
        if self._stop.requested:
            notice("stopped")
        print("\n" + "\n".join(timing.lines()))
        engine = self._report()
        if engine:
            print(engine)
        print(flush=True)


def _criteria(stop: Stop) -> Any:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList([stop])
