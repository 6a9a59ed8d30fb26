"""Training of the early exit: it learns, it is saved whole, it goes on after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_plugin.errors import ConfigError, SpeculationError
from lever_ext import exit_training
from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.exit_training import ExitTraining, train_exit
from lever_ext.target import FlashTarget, load_target

QUICK = ExitTraining(epochs=4, batch=64, rate=3e-3)


@pytest.fixture
def target(packs: dict[str, Path]) -> Any:
    opened = load_target(packs["llama"])
    yield opened
    opened.close()


def text(length: int = 600) -> list[int]:
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def test_training_lowers_the_loss_and_saves_layer_and_loss(
    target: FlashTarget, tmp_path: Path
) -> None:
    losses = []
    for epochs in (1, 8):
        made = train_exit(
            target,
            text(),
            tmp_path / "exit",
            None,
            ExitTraining(epochs=epochs, rate=3e-3, batch=64),
        )
        losses.append(made.loss)
    assert losses[1] < 0.95 * losses[0]
    shape = (64, 32)
    found = ExitPredictor.load(tmp_path / "exit", target.pack.index.fingerprint, shape, 4)
    assert found.layer == 2 and found.loss == losses[1]
    torch.testing.assert_close(found.weight, made.weight)
    target.load_gate(tmp_path / "exit")
    assert target.gate is not None and list(tmp_path.iterdir()) == [tmp_path / "exit"]


def test_predictor_equals_what_was_trained(target: FlashTarget, tmp_path: Path) -> None:
    """The saved rows give the same scores as head, map and scale one after another."""
    made = train_exit(target, text(), tmp_path / "exit", 2, QUICK)
    found = exit_training.collect(target, text(), 2)
    scores = torch.stack([made.scores(state, range(64)) for state in found.hidden[:40]])
    agree = (scores.argmax(-1) == target.model.lm_head(found.final[:40]).argmax(-1)).float().mean()
    untrained = target.model.lm_head(found.hidden[:40]).argmax(-1) == target.model.lm_head(
        found.final[:40]
    ).argmax(-1)
    assert agree > untrained.float().mean()


def test_an_interrupted_training_goes_on(
    target: FlashTarget, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "exit"
    output.write_bytes(b"the predictor from before")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "training" and done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_exit(target, text(), output, 2, QUICK, interrupt)
    assert output.read_bytes() == b"the predictor from before"
    seen: list[int] = []
    train_exit(
        target,
        text(),
        output,
        2,
        QUICK,
        lambda stage, done, total: seen.append(done) if stage == "training" else None,
    )
    assert "going on after 2 epochs" in caplog.text and len(seen) == 2 * 9
    assert not (tmp_path / "exit.partial").exists()


@pytest.mark.parametrize(
    ("layer", "length", "settings", "match"),
    [
        (0, 600, {}, "exit layer"),
        (4, 600, {}, "exit layer"),
        (2, 10, {}, "at least 64"),
        (2, 600, {"tau": 0}, "tau"),
    ],
)
def test_what_makes_no_sense_is_refused(
    target: FlashTarget,
    tmp_path: Path,
    layer: int,
    length: int,
    settings: dict[str, Any],
    match: str,
) -> None:
    with pytest.raises(ConfigError, match=match):
        train_exit(target, text(length), tmp_path / "exit", layer, ExitTraining(**settings))


def test_foreign_and_damaged_predictors_are_refused(
    target: FlashTarget, packs: dict[str, Path], tmp_path: Path
) -> None:
    made = train_exit(target, text(), tmp_path / "exit", 2, ExitTraining(epochs=1))
    content = (tmp_path / "exit").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    other = load_target(packs["qwen2"])
    with pytest.raises(SpeculationError, match="another model"):
        other.load_gate(tmp_path / "exit")
    other.close()
    for name in ("cut", "missing"):
        with pytest.raises(SpeculationError, match="cannot read"):
            target.load_gate(tmp_path / name)
    with pytest.raises(SpeculationError, match="cannot write"):
        made.save(tmp_path / "exit" / "below a file")
