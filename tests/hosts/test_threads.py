"""Threads that share a model: each gets the text that it gets alone, with every backend."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from at_once import LONG_S, in_threads
from replayed import Replayed
from transformers.generation.streamers import BaseStreamer

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.cpu.kt_experts import KTExperts
from hybrimoe_plugin.decode import connect, layer_buffers
from hybrimoe_plugin.errors import BackendError

pytestmark = pytest.mark.slow

THREADS = 8
ANSWERS = int(os.environ.get("HYBRIMOE_LONG", 1))
"""Of each thread."""
GAP = 0.03
"""Least distance between the likeliest token and the next: where an expert computes changes the
rounding, and with it which of two that are all but tied is chosen.
"""

EMULATED = {"accelerator": "emulated", "cache_ratio": 0.4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("mixtral", {"cpu_backend": "torch"}),
    "ggml": ("qwen3_moe", {"cpu_backend": "ggml"}),
    "ggml, latent attention": ("deepseek_v3", {"cpu_backend": "ggml"}),
    "ggml, module by module": (
        "qwen2_moe",
        {"cpu_backend": "ggml", "cpu_graphs": "off", "dtype": "bfloat16"},
    ),
    "kt": ("qwen3_moe", {"cpu_backend": "kt"}),
    "emulated, ggml": ("mixtral", {**EMULATED, "cpu_backend": "ggml"}),
    "emulated, kt": ("qwen3_moe", {**EMULATED, "cpu_backend": "kt"}),
    "emulated, torch": ("qwen3_moe", {**EMULATED, "cpu_backend": "torch", "cache": "lru"}),
    "captured": ("mixtral", {**EMULATED, "cpu_backend": "torch", "linears": "plain"}),
    "two engines, one pool": ("mixtral", {**EMULATED, "cpu_backend": "kt", "rules": "two engines"}),
}
TWO_ENGINES = """
- match: {name: "layers\\\\.0\\\\.mlp\\\\.experts$"}
  replace:
    class: hybrimoe_plugin.operators.experts.HybriMoEExperts
    kwargs: {prefill_device: "cuda:0", generate_device: "cuda:0"}
- match: {name: "layers\\\\.1\\\\.mlp\\\\.experts$"}
  replace:
    class: hybrimoe_plugin.operators.experts.HybriMoEExperts
    kwargs: {prefill_device: "cuda:1", generate_device: "cuda:1"}
"""


class Streamed(BaseStreamer):  # type: ignore[misc]
    """Collects what is streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


class Question(NamedTuple):
    """A prompt, and how the answer is made."""

    prompt: torch.Tensor
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    streamed: bool = False

    def ask(self, model: Any) -> list[int]:
        streamer = Streamed() if self.streamed else None
        found = model.generate(
            self.prompt,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            streamer=streamer,
            **self.options,
        )
        tokens: list[int] = found.flatten().tolist()
        assert streamer is None or streamer.tokens == tokens
        return tokens


class Case(NamedTuple):
    model: Any
    questions: list[Question]
    alone: list[list[int]]


def questions(model: Any, decided: bool) -> list[Question]:
    """Of different lengths and ways.

    Args:
        decided: whether an expert is always computed at the same place: then near ties do no harm.
    """
    found, seed = [], 0
    while len(found) < THREADS:
        seed += 1
        question = Question(tiny.tokens(3 + 5 * seed % 17, seed, batch=2 if len(found) == 3 else 1))
        if len(found) == 1 and decided:
            question = question._replace(options={"num_beams": 2})
        elif len(found) == 2:
            question = question._replace(options={"prompt_lookup_num_tokens": 2})
        elif len(found) == 4:
            question = question._replace(streamed=True)
        if decided or clear(model, question.prompt):
            found.append(question)
    return found


def clear(model: Any, prompt: torch.Tensor) -> bool:
    """Whether no choice on the way is a near tie."""
    found = model.generate(
        prompt,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(found.scores).topk(2).values
    return bool((best[..., 0] - best[..., 1]).min() > GAP)


def load(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    family, choices = KINDS[kind]
    choices = {"dtype": "float32", **choices}
    tiny.write_quantised(folder / "model.gguf", family)
    if "rules" in choices:
        choices["rules"] = folder / "rules.yaml"
        choices["rules"].write_text(TWO_ENGINES)
    if kind == "captured":
        patch.setattr(layer_buffers, "FIRST_CAPACITY", 16)
        patch.setattr(connect, "capture_for", lambda _device: Replayed())
    return load_model(None, folder / "model.gguf", progress=False, **choices)[0]


@pytest.fixture(scope="module", params=sorted(KINDS))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    with pytest.MonkeyPatch.context() as patch:
        model = load(request.param, tmp_path_factory.mktemp("model"), patch)
        asked = questions(model, "accelerator" not in KINDS[request.param][1])
        yield Case(model, asked, [question.ask(model) for question in asked])
        model.hybrimoe.close()


def test_each_thread_gets_what_it_gets_alone(case: Case) -> None:
    def answer(mine: int) -> list[int] | str:
        try:
            return case.questions[mine].ask(case.model)
        except Exception as error:
            return repr(error)

    def answers(mine: int) -> list[list[int] | str]:
        return [answer(mine) for _ in range(ANSWERS)]

    found = in_threads([lambda mine=mine: answers(mine) for mine in range(THREADS)])  # type: ignore[misc]
    wrong = [got for mine, all_ in enumerate(found) for got in all_ if got != case.alone[mine]]
    assert not wrong, f"{len(wrong)} of {THREADS * ANSWERS} answers are wrong"
    case.model.hybrimoe.check_integrity()
    if len(case.model.hybrimoe.engines) > 1:
        first, second = (
            getattr(engine.cpu, "backend", engine.cpu) for engine in case.model.hybrimoe.engines
        )
        assert first is second


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        made = load("ggml", tmp_path_factory.mktemp("model"), patch)
        yield made
        made.hybrimoe.close()


def test_answers_interleave_step_by_step(model: Any) -> None:
    order: list[int] = []
    hook = model.model.register_forward_pre_hook(lambda *_: order.append(threading.get_ident()))
    asked = [Question(tiny.tokens(4, seed)) for seed in range(2)]
    in_threads([lambda mine=mine: [mine.ask(model) for _ in range(4)] for mine in asked])  # type: ignore[misc]
    hook.remove()
    first = {ident: order.index(ident) for ident in order}
    last = {ident: len(order) - 1 - order[::-1].index(ident) for ident in order}
    assert max(first.values()) < min(last.values()), (
        "the second thread begins before the first one ends"
    )


def test_parts_that_are_called_from_outside_wait_for_their_turn(model: Any) -> None:
    ids, question = tiny.tokens(1), Question(tiny.tokens(9, 1))
    embed, head, base = model.get_input_embeddings(), model.get_output_embeddings(), model.model
    hidden = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    calls: list[Callable[[], Any]] = [
        lambda: base(ids, use_cache=False).last_hidden_state,
        lambda: head(hidden),
        lambda: embed(ids),
        lambda: torch.tensor(question.ask(model)),
    ]
    with torch.no_grad():
        alone = [call() for call in calls]

    def often(call: Callable[[], Any]) -> list[Any]:
        with torch.no_grad():
            return [call() for _ in range(3 if call is calls[-1] else 60)]

    for mine, found in enumerate(in_threads([lambda call=call: often(call) for call in calls])):  # type: ignore[misc]
        for value in found:
            torch.testing.assert_close(value, alone[mine], rtol=0, atol=0)


def test_an_interrupt_in_one_thread_leaves_the_model_to_the_others(model: Any) -> None:
    asked, ids = Question(tiny.tokens(9, 3)), tiny.tokens(5)
    alone = asked.ask(model)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        whole = model.model(ids).last_hidden_state
        hook = model.model.norm.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            in_threads([lambda: asked.ask(model)])
        with pytest.raises(KeyboardInterrupt):
            asked.ask(model)
        hook.remove()
        torch.testing.assert_close(model.model(ids).last_hidden_state, whole)
    assert in_threads([lambda: asked.ask(model)] * 2) == [alone] * 2


class Stopped:
    """A model whose next pass stops in its middle, on a thread of its own, until it is let go."""

    def __init__(self, model: Any) -> None:
        self._go, inside = threading.Event(), threading.Event()

        def stop(*_: object) -> None:
            inside.set()
            assert self._go.wait(LONG_S)

        self._hook = model.model.norm.register_forward_pre_hook(stop)
        self._thread = threading.Thread(target=lambda: model(tiny.tokens(4)), daemon=True)
        self._thread.start()
        assert inside.wait(LONG_S)

    def go(self) -> None:
        self._hook.remove()
        self._go.set()
        self._thread.join(LONG_S)


def test_two_models_compute_at_the_same_time(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load("torch", tmp_path, monkeypatch)
    stopped = Stopped(other)
    assert len(in_threads([lambda: Question(tiny.tokens(4)).ask(model)])[0]) == 10
    stopped.go()
    other.hybrimoe.close()


def test_closing_waits_for_the_running_pass_and_then_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("ggml", tmp_path, monkeypatch)
    stopped = Stopped(model)
    closing = threading.Thread(target=model.hybrimoe.close, daemon=True)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive(), "memory is given back under a thread that computes"
    stopped.go()
    closing.join(LONG_S)
    for call in (model, model.model):
        with pytest.raises(BackendError, match="was closed"):
            call(tiny.tokens(3))


def test_closing_a_timeline_while_others_compute(model: Any, tmp_path: Path) -> None:
    question = Question(tiny.tokens(5))

    def draw() -> None:
        for place in range(20):
            model.hybrimoe.timeline(tmp_path / f"{place}.json").close()
            assert model.hybrimoe.stats().calls >= 0
            model.hybrimoe.reset_stats()

    in_threads([draw, lambda: [question.ask(model) for _ in range(4)]])
    assert all(engine.timeline is None for engine in model.hybrimoe.engines), (
        "nothing is planned for a closed one"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked on this system")
def test_a_forked_process_is_told_that_its_threads_are_gone(model: Any) -> None:
    model(tiny.tokens(3))
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            model(tiny.tokens(3))
        except BackendError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    model(tiny.tokens(3))


def test_standard_output_survives_two_pools_made_at_once() -> None:
    """kt-kernel's greetings are kept from it meanwhile."""
    before = os.fstat(1)
    in_threads([lambda: [KTExperts(1).close() for _ in range(10)]] * 3)
    assert os.path.samestat(before, os.fstat(1))
