"""A conversation with one model: history, answers, and what is printed after them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hybrimoe_plugin.cli.answer import Stop, TimedStreamer, Timing
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.reading import is_file, read_message, read_prompt_file
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.hosts.transformers.sampling import FlashSampling

HELP = '/exit leaves, /clear forgets the conversation, """ begins and ends several lines, a file name sends the file'
THINK = "<think>\n"


@dataclass(frozen=True)
class ChatOptions:
    """How answers are made.

    Attributes:
        max_new_tokens: longest answer.
        sampling: overrides of the model's generation config, such as `do_sample` and `temperature`.
        force_think: begin every answer with `<think>`.
        chunk_prefill_size: prompts longer than this are computed in pieces.
        sampler: `auto` lets flashinfer filter tokens where it is faster, `transformers` leaves that to transformers.
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
        self._sampling = FlashSampling(model)
        self._stop = Stop()
        self._streamer = TimedStreamer(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))

    def answer(self, content: str) -> bool:
        """Stream the answer to a message and print the counts and rates after it.

        Returns:
            False if Ctrl-C cut the answer short.

        Raises:
            ConfigError: message and answer are longer than the model's context.
        """
        self.messages.append({"role": "user", "content": content})
        try:
            prompt = self._fitting_prompt()
            text = self._generate(prompt)
        except BaseException:
            # Ctrl-C before an answer, or an error: the history must not hold a question without one.
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
            except ConfigError as error:
                notice(f"error: {error}")
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
        """[1, T] ids of the conversation, without its oldest turns where it is longer than the model's context."""
        context = getattr(self.model.config, "max_position_embeddings", None)
        dropped = 0
        while True:
            prompt = self._encode()
            needed = prompt.shape[1] + self.options.max_new_tokens
            if context is None or needed <= context:
                break
            if len(self.messages) <= 2:
                raise ConfigError(
                    f"it has {prompt.shape[1]} tokens, the answer may have {self.options.max_new_tokens}, "
                    f"the model's context has {context}: shorten it or give a smaller --max_new_tokens"
                )
            del self.messages[:2]
            dropped += 1
        if dropped:
            notice(f"the conversation is longer than the model's context: its first {dropped} turn(s) were left out")
        return prompt

    def _encode(self) -> torch.Tensor:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
            special = False
        else:
            text, special = "\n".join(message["content"] for message in self.messages), True
        if self.options.force_think:
            text += THINK
        ids = self.tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids
        if ids.shape[1] == 0:
            raise ConfigError("the message has no tokens")
        assert isinstance(ids, torch.Tensor)
        return ids

    @torch.no_grad()
    def _generate(self, prompt: torch.Tensor) -> str:
        config = self._generation_config(prompt.shape[1])
        device = getattr(self.model, "device", prompt.device)
        if self.options.force_think:
            print(THINK, end="", flush=True)
        self._report()
        self._streamer.start(prompt.shape[1])
        with self._stop.listening():
            self.model.generate(
                prompt.to(device),
                attention_mask=torch.ones_like(prompt).to(device),
                stopping_criteria=_criteria(self._stop),
                **self._filtering(config),
                **self._decoding(prompt),
            )
        text = self.tokenizer.decode(self._streamer.timing.ids, skip_special_tokens=True)
        return str(text)

    def _filtering(self, config: Any) -> dict[str, Any]:
        """How `generate` shall draw; custom decoding methods draw by themselves."""
        if self._decoder is not None or self.options.sampler != "auto":
            return {"generation_config": config}
        return self._sampling.arguments(config)

    def _decoding(self, prompt: torch.Tensor) -> dict[str, Any]:
        """How `generate` shall stream; it shows custom decoding methods neither the streamer nor it the prompt."""
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
