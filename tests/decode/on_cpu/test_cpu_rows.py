"""Calls of a few rows on the CPU in two graphs a layer: the logits of the plain twin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from steps import prefill, step

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.cpu.ggml import Graph
from hybrimoe_plugin.decode.on_cpu.cpu_step import CpuStep

needs.kt_kernel()

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3")
ROWS = (2, 3, 4, 8, 16, 17, 32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """In tiny operations more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Pair:
    """A model and its plain twin, of one file."""

    def __init__(self, folder: Path, family: str, types: Any = lambda name: "F32") -> None:
        path = tiny.write(folder, family, types=types)
        self.model = load_model(None, path, progress=False, accelerator="none")[0]
        self.twin = load_model(None, path, progress=False, accelerator="none", graphs="off")[0]

    def close(self) -> None:
        self.model.hybrimoe.close()
        self.twin.hybrimoe.close()


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path, request.param)
    yield made
    made.close()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every call of a layer's graphs."""
    counts: list[int] = []
    call = CpuStep.rows

    def note(self: CpuStep, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        counts.append(hidden.shape[0] * hidden.shape[1])
        return call(self, hidden, *args)

    monkeypatch.setattr(CpuStep, "rows", note)
    return counts


@torch.no_grad()
def sequences(model: Any, rows: int, steps: int = 2) -> torch.Tensor:
    """Logits of the next tokens of some sequences, [rows, steps, V]."""
    cache = prefill(model, tiny.tokens(5, batch=rows))
    tokens = tiny.tokens(steps, seed=1, batch=rows)
    found = [step(model, tokens[:, at : at + 1], cache).logits for at in range(steps)]
    return torch.cat(found, dim=1)


@torch.no_grad()
def chain(model: Any, rows: int) -> torch.Tensor:
    """Logits of some tokens in one call, behind others, [1, rows, V]."""
    cache = prefill(model, tiny.tokens(40))
    return step(model, tiny.tokens(rows, seed=1), cache).logits


def test_logits_are_the_plain_twins(pair: Pair, taken: list[int]) -> None:
    """Counts go up and down, so that kept graphs are used again."""
    for rows in (*ROWS, 2, 16):
        for call in (sequences, chain):
            found = call(pair.model, rows)
            assert taken.count(rows) >= len(pair.model.model.layers), "every layer"
            torch.testing.assert_close(found, call(pair.twin, rows), rtol=1e-4, atol=1e-4)
            del taken[:]


def test_a_call_of_more_rows_is_a_prompt(tmp_path: Path, taken: list[int]) -> None:
    pair = Pair(tmp_path, "mixtral")
    chain(pair.model, 33)
    assert not taken
    pair.close()


def test_padded_conversations_are_masked(tmp_path: Path, taken: list[int]) -> None:
    pair = Pair(tmp_path, "qwen3_moe")
    ids, more = tiny.tokens(6, batch=3), tiny.tokens(1, seed=1, batch=3)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :2] = 0
    found = []
    with torch.no_grad():
        for model in (pair.model, pair.twin):
            cache = prefill(model, ids, attention_mask=mask[:, :6])
            found.append(step(model, more, cache, attention_mask=mask).logits)
    assert 3 in taken
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    pair.close()


def test_the_call_after_an_interrupted_one_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tmp_path, "deepseek_v2_lite")
    wanted = sequences(pair.model, 4)
    run, left = Graph.run, [7]

    def interrupted(graph: Graph) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        run(graph)

    with monkeypatch.context() as patch:
        patch.setattr(Graph, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sequences(pair.model, 4)
    torch.testing.assert_close(sequences(pair.model, 4), wanted)
    pair.close()


def test_steps_of_one_and_of_several_rows_take_turns(tmp_path: Path) -> None:
    """Both read the layer's input in the same memory."""
    pair = Pair(tmp_path, "qwen2_moe")
    found = []
    for model in (pair.model, pair.twin):
        with torch.no_grad():
            cache = prefill(model, tiny.tokens(5))
            logits = []
            for seed, count in enumerate((1, 4, 1, 2, 4)):
                out = step(model, tiny.tokens(count, seed=seed), cache)
                logits.append(out.logits)
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    pair.close()
