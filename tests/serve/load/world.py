"""A real server of a tiny model in a thread, and what each question's only right answer is."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from byte_language import byte_tokenizer
from serving import served

from hybrimoe_plugin import load_model
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf
from hybrimoe_plugin.serve.batching.scheduler import Scheduler
from hybrimoe_plugin.serve.http.layers import Access
from hybrimoe_plugin.serve.metrics.metrics import Metrics
from hybrimoe_plugin.serve.routers import all_routers
from hybrimoe_plugin.serve.service import Service

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NAME = "load/tiny"
LENGTH = 24
"""Tokens of a whole answer."""
CLEAR = 1e-3
"""How far a token's logit is above all others at least.

Rows of a batch are rounded differently than a row alone: by about 1e-6 here.
"""
CONTEXT = 512
EMULATED: dict[str, Any] = {"accelerator": "emulated", "cache_ratio": 0.5}
"""Settings by which half of the experts lie on an accelerator that this process plays."""


@dataclass(frozen=True)
class Question:
    """One prompt and its greedy answer.

    Attributes:
        body: of a request, without options.
        text: of `LENGTH` tokens, each of them one character; the text ends nowhere.
    """

    path: str
    body: dict[str, Any]
    text: str


@dataclass(frozen=True)
class World:
    """A server and questions for it.

    Attributes:
        port: on 127.0.0.1.
    """

    port: int
    service: Service
    questions: list[Question]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True)
class Prepared:
    """A model's file, and questions whose answers transformers alone has given."""

    path: Path
    questions: list[Question]


def prepare(folder: Path, questions: int = 24) -> Prepared:
    """Write a model into a folder, and ask it."""
    tokenizer = byte_tokenizer()
    plain = printing_model(tokenizer)
    path = folder / "model.gguf"
    export_gguf(plain, path)
    return Prepared(path, clear_questions(plain, tokenizer, questions))


@contextmanager
def world(
    prepared: Prepared,
    batch: int = 8,
    queue: int = 256,
    kv_bytes: int = 1 << 20,
    prefix_bytes: int = 4 << 20,
    **settings: Any,
) -> Iterator[World]:
    """Serve, and end the server afterwards.

    Args:
        kv_bytes: by default, less than `batch` answers need.
        prefix_bytes: by default, less than all answers leave behind.
        settings: of the engine, such as `accelerator`.
    """
    tokenizer = byte_tokenizer()
    exact = {"dtype": "float32", "cpu_backend": "torch", "progress": False}
    model, _ = load_model(None, prepared.path, **{"accelerator": "none", **exact, **settings})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    metrics = Metrics(NAME, model.hybrimoe.stats)
    scheduler = Scheduler(
        model,
        batch=batch,
        queue=queue,
        kv_bytes=kv_bytes,
        prefix_bytes=prefix_bytes,
        piece=64,
        observer=metrics,
    )
    service = Service(model, tokenizer, NAME, scheduler)
    service.metrics = metrics
    try:
        routers = all_routers(service)
        with served(service, Access("127.0.0.1"), routers=routers) as port:
            yield World(port, service, prepared.questions)
    finally:
        scheduler.close(0)
        model.hybrimoe.close()


def printing_model(tokenizer: Any) -> Any:
    """A tiny float32 model whose greedy answers are letters and signs of ASCII alone."""
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    model = tiny.model("mixtral", **changes, eos_token_id=tokenizer.eos_token_id)
    printed = tokenizer.convert_tokens_to_ids(list(string.ascii_letters + string.digits + ".,-"))
    others = [token for token in range(len(tokenizer)) if token not in printed]
    with torch.no_grad():
        model.get_output_embeddings().weight[others] = 0.0
    model.generation_config.eos_token_id = None  # what is asked for is `LENGTH` tokens
    return model


def clear_questions(model: Any, tokenizer: Any, count: int) -> list[Question]:
    """Questions whose every token is far above all others; conversations and plain texts."""
    drawn = random.Random(0)
    found: list[Question] = []
    while len(found) < count:
        path = CHAT if len(found) % 3 else COMPLETIONS
        if path == COMPLETIONS:
            body: dict[str, Any] = {"prompt": sentence(drawn)}
            ids = tokenizer.encode(body["prompt"], add_special_tokens=False)
        else:
            messages = [{"role": "user", "content": sentence(drawn)}]
            if len(found) % 2:  # a second turn, whose first one others ask for
                said = {"role": "assistant", "content": sentence(drawn)}
                messages += [said, {"role": "user", "content": sentence(drawn)}]
            body = {"messages": messages}
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        text = clear_answer(model, tokenizer, ids)
        if text is not None and all(text != other.text for other in found):
            found.append(Question(path, {"model": NAME, **body}, text))
    return found


def sentence(drawn: random.Random) -> str:
    words = ("who", "asks", "the", "same", "thing", "twice", "may", "hear", "another", "answer")
    return " ".join(drawn.choices(words, k=drawn.randint(1, 16)))


@torch.no_grad()
def clear_answer(model: Any, tokenizer: Any, ids: list[int]) -> str | None:
    """The greedy answer of `LENGTH` tokens by transformers alone; None where one is not clear."""
    given = torch.tensor([ids])
    made = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=LENGTH,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.logits)[:, 0].topk(2).values
    if (best[:, 0] - best[:, 1]).min() < CLEAR:
        return None
    return str(tokenizer.decode(made.sequences[0, len(ids) :]))
