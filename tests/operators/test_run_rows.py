"""`model.hybrimoe.run_rows`: a pass of several conversations, or of a draft's tree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from interrupts import ended, operations
from loading import injected, plain

from hybrimoe_plugin import load_model
from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.policy.step import Rows

ROWS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("rows")
    path = tiny.write(folder, "mixtral", types=lambda name: "F32")
    choices: dict[str, Any] = {"accelerator": "emulated", "cache_ratio": 0.5}
    choices |= {"dtype": "float32", "cpu_backend": "torch"}
    made = load_model(None, path, progress=False, **choices)[0]
    yield made
    made.hybrimoe.close()


def conversations(count: int) -> Rows:
    return Rows(np.arange(count), np.ones(count, bool))


@torch.no_grad()
def test_it_gives_what_the_model_gives(model: Any) -> None:
    ids = tiny.tokens(ROWS).reshape(ROWS, 1)
    wanted = model(ids).logits
    found = model.hybrimoe.run_rows(conversations(ROWS), model, input_ids=ids).logits
    torch.testing.assert_close(found, wanted)
    assert all(engine.rows is None for engine in model.hybrimoe.engines)


@torch.no_grad()
def test_another_number_of_rows_is_refused_and_forgotten(model: Any) -> None:
    ids = tiny.tokens(ROWS)
    with pytest.raises(InputError, match=f"{ROWS} rows"):
        model.hybrimoe.run_rows(conversations(ROWS - 1), model, ids)
    model(ids)


@torch.no_grad()
def test_a_pass_within_another_has_its_own_rows(model: Any) -> None:
    ids, engine = tiny.tokens(ROWS), model.hybrimoe.engines[0]

    def outer() -> Rows:
        model.hybrimoe.run_rows(conversations(ROWS - 1), model, ids[:, 1:])
        rows: Rows = engine.rows
        return rows

    assert len(model.hybrimoe.run_rows(conversations(ROWS), outer).owners) == ROWS
    assert engine.rows is None


def test_an_interrupt_anywhere_leaves_no_rows_for_the_next_pass(model: Any) -> None:
    handle, engine = model.hybrimoe, model.hybrimoe.engines[0]

    def call() -> None:
        handle.run_rows(conversations(ROWS), int)

    left = 0
    for at in range(1, operations(call)):
        ended(call, at, KeyboardInterrupt())
        left += engine.rows is not None
        assert handle.turns.run(lambda: engine.rows) is None
    assert left, "interrupts fall on the end of a pass too"


@pytest.mark.parametrize(
    "rows",
    [
        None,
        (np.arange(ROWS), np.ones(ROWS, bool)),
        Rows(np.array(["a", "b", "c", "d"]), np.ones(ROWS, bool)),
        Rows(np.arange(ROWS), np.array(["no"] * ROWS)),
        Rows([[1, 2], 3, 4, 5], np.ones(ROWS, bool)),  # type: ignore[arg-type]
    ],
)
@torch.no_grad()
def test_what_are_no_rows_is_refused_before_the_pass(model: Any, rows: Any) -> None:
    with pytest.raises(InputError, match="owners|sure"):
        model.hybrimoe.run_rows(rows, pytest.fail, "the pass was made")


@torch.no_grad()
def test_rows_may_change_once_the_pass_is_made(model: Any) -> None:
    ids, tree = tiny.tokens(ROWS), Rows(np.zeros(ROWS, np.int64), np.arange(ROWS) == 0)
    model.hybrimoe.run_rows(tree, model, ids)
    tree.sure[:] = True
    draft = model.hybrimoe.engines[0].controller.cache._draft
    assert draft.corrected(np.zeros(ROWS, bool))[1][0].rows.sure.tolist() == [True] + [False] * 3


@torch.no_grad()
def test_a_verification_corrects_what_was_learned(model: Any) -> None:
    cache = model.hybrimoe.engines[0].controller.cache
    tree = Rows(np.zeros(ROWS, np.int64), np.arange(ROWS) == 0)
    model.hybrimoe.run_rows(tree, model, tiny.tokens(ROWS))
    before = cache.ranks.copy()
    model.hybrimoe.verified([True, True, False, False])
    assert (cache.ranks != before).any()


def test_a_verification_takes_truth_values_alone(model: Any) -> None:
    with pytest.raises(InputError, match="truth values"):
        model.hybrimoe.verified([0, 2, 3, 1])


@torch.no_grad()
def test_a_pass_that_failed_is_not_verified(model: Any) -> None:
    cache = model.hybrimoe.engines[0].controller.cache
    tree = Rows(np.zeros(ROWS, np.int64), np.arange(ROWS) == 0)

    def fails() -> None:
        model(tiny.tokens(ROWS))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.hybrimoe.run_rows(tree, fails)
    before = cache.ranks.copy()
    model.hybrimoe.verified([True, True, False, False])
    assert (cache.ranks == before).all()


@torch.no_grad()
def test_on_the_cpu_alone_all_rows_are_computed_where_fewer_logits_are_asked_for(
    tmp_path: Path,
) -> None:
    path = tiny.write(tmp_path, "qwen3_moe", types=lambda name: "F32")
    made = injected(path, accelerator="none", cpu_backend="ggml")
    ids = tiny.tokens(ROWS)
    found = made.hybrimoe.run_rows(conversations(ROWS), made, ids, logits_to_keep=1).logits
    torch.testing.assert_close(found, plain(path)(ids).logits[:, -1:], rtol=1e-4, atol=1e-4)
    made.hybrimoe.close()


@torch.no_grad()
def owners_in_generate(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int] | None]:
    """The owners of rows that every layer call is told; a prompt and two steps are made."""
    seen = []
    engine = model.hybrimoe.engines[0]
    run = engine.run

    def watched(*args: Any) -> torch.Tensor:
        seen.append(None if engine.rows is None else engine.rows.owners.tolist())
        result: torch.Tensor = run(*args)
        return result

    monkeypatch.setattr(engine, "run", watched)
    ids = tiny.tokens(2 * ROWS).reshape(ROWS, 2)
    model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert engine.rows is None
    return seen


def test_a_batch_s_decode_step_has_rows_and_a_prompt_has_none(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = len(model.hybrimoe.engines[0].layers)
    steps = [list(range(ROWS))] * layers * 2
    assert owners_in_generate(model, monkeypatch) == [None] * layers + steps


def test_on_the_cpu_alone_nobody_is_told_of_a_batch_s_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = injected(tiny.write(tmp_path, "mixtral"), accelerator="none", cpu_backend="torch")
    layers = len(made.hybrimoe.engines[0].layers)
    assert owners_in_generate(made, monkeypatch) == [None] * layers * 3
    made.hybrimoe.close()
