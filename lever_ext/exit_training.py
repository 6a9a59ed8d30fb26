"""Training of the early-exit predictor, offline, with the target frozen (paper 2b).

    loss = tau^2 (KL(softmax(z / tau) || softmax(W h / tau))
                  + lambda * the same KL over the draft's candidates)

z are the target's logits, h the hidden states that enter the exit layer. W starts as the target's
own output head U after its final norm; what is trained is a map A [H, H] before it, W = U (I + A):
some thousand positions say enough about H x H numbers, not about V x H. The candidates are the
target's own likeliest tokens, as a good draft's are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrimoe_plugin.errors import ConfigError
from lever_ext.early_exit.predictor import ExitPredictor, write_file
from lever_ext.operators.decoder import FlashDecoderLayer
from lever_ext.target import FlashTarget

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""
WINDOW = 512
"""Tokens of one target pass over the training text."""


@dataclass(frozen=True)
class ExitTraining:
    """How the predictor is trained.

    Raises:
        ConfigError: naming field, value and allowed range.
    """

    tau: float = 2.0
    """Softmax temperature."""
    weight: float = 1.0
    """lambda, of the loss over candidates."""
    candidates: int = 8
    """Of each position."""
    epochs: int = 6
    batch: int = 128
    """Positions of one step."""
    rate: float = 3e-4
    """Learning rate of Adam."""
    held_out: float = 0.1
    """Share of the positions that the final loss is measured on."""
    seed: int = 0
    """Of the choice of held-out positions."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("tau", 0.1, 100),
            ("weight", 0, 100),
            ("rate", 1e-7, 1),
            ("held_out", 0.01, 0.5),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}: expected {low} to {high}, found {value!r}")
        for name in ("candidates", "epochs", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value!r}")


@dataclass(frozen=True)
class Positions:
    """What the frozen target computed over a text."""

    hidden: torch.Tensor
    """[N, H], what enters the exit layer."""
    final: torch.Tensor
    """[N, H], what enters the output head."""


def train_exit(
    target: FlashTarget,
    ids: Sequence[int],
    output: str | Path,
    layer: int | None = None,
    settings: ExitTraining | None = None,
    progress: Progress | None = None,
) -> ExitPredictor:
    """Train a predictor for a target and save it; an earlier file stays whole until then.

    Args:
        target: the target; its weights are not changed.
        ids: token ids of a text like the target's answers.
        output: the predictor's file; an interrupted training is resumed from `output.partial`.
        layer: exit before this decoder layer; by default the middle one.
        settings: of the training.
        progress: told about every window and step.

    Raises:
        ConfigError: the layer is none of the target's, or the text too short.
        FlashError: the pack cannot be read.
        SpeculationError: the predictor cannot be written.
    """
    settings = settings or ExitTraining()
    layers = len(target.model.base_model.layers)
    layer = layers // 2 if layer is None else layer
    if not 0 < layer < layers:
        raise ConfigError(f"exit layer: expected 1 to {layers - 1}, found {layer}")
    if len(ids) < 64:
        raise ConfigError(
            f"the training text has {len(ids)} tokens; at least 64 are needed, thousands are better"
        )
    found = collect(target, ids, layer, progress)
    head = target.model.get_output_embeddings().weight.detach().float()
    fingerprint = target.pack.index.fingerprint
    key = f"{fingerprint} {layer} {len(ids)} {settings}"
    checkpoint = _Checkpoint(Path(f"{output}.partial"), key)
    # The final norm as a linear map: its own weights, over one length for all states.
    lengths = found.hidden.float().pow(2).mean(-1).sqrt()
    scale = _norm_weight(target.model) / lengths.mean()
    change, loss = _fit(found, head, scale, settings, checkpoint, progress)
    weight = (head + head @ change.T) * scale
    predictor = ExitPredictor(weight.to(target.model.dtype), layer, loss, fingerprint)
    predictor.save(output)
    checkpoint.remove()
    return predictor


def collect(
    target: FlashTarget,
    ids: Sequence[int],
    layer: int,
    progress: Progress | None = None,
) -> Positions:
    """Run the target over a text in windows.

    Args:
        target: the target.
        ids: token ids of the text.
        layer: the exit layer.
        progress: told after every window.

    Returns:
        hidden states at the exit layer and before the head.

    Raises:
        FlashError: the pack cannot be read.
    """
    base = target.model.base_model
    operator = base.layers[layer]
    assert isinstance(operator, FlashDecoderLayer)
    hidden: list[torch.Tensor] = []
    final: list[torch.Tensor] = []

    def keep_input(_module: nn.Module, args: tuple[Any, ...]) -> None:
        hidden.append(args[0][0].clone())

    hook = operator.register_forward_pre_hook(keep_input)
    try:
        for start in range(0, len(ids), WINDOW):
            window = torch.tensor([ids[start : start + WINDOW]])
            with torch.no_grad():
                output = base(window, use_cache=False)
            final.append(output.last_hidden_state[0].clone())
            if progress is not None:
                progress("reading the text", min(start + WINDOW, len(ids)), len(ids))
    finally:
        hook.remove()
    return Positions(torch.cat(hidden), torch.cat(final))


def _norm_weight(model: Any) -> torch.Tensor:
    """Of the final norm, [H]."""
    weight: torch.Tensor = model.base_model.norm.weight.detach().float()
    return weight


def _fit(
    found: Positions,
    head: torch.Tensor,
    scale: torch.Tensor,
    settings: ExitTraining,
    checkpoint: _Checkpoint,
    progress: Progress | None,
) -> tuple[torch.Tensor, float]:
    """Train the map A.

    Args:
        found: the positions.
        head: U, [V, H].
        scale: of the states, [H].
        settings: of the training.
        checkpoint: where an interrupted training is resumed; saved after every epoch.
        progress: told after every step.

    Returns:
        (A [H, H], loss on held-out positions).
    """
    states = found.hidden.float() * scale
    final = found.final.float()
    order = _shuffled(len(states), settings.seed)
    count = max(1, int(settings.held_out * len(order)))
    held, trained = order[:count], order[count:]
    done, change = checkpoint.load(head.shape[1])
    change.requires_grad_(True)
    optimizer = torch.optim.Adam([change], lr=settings.rate)
    for epoch in range(done, settings.epochs):
        shuffled = trained[_shuffled(len(trained), seed=epoch)]
        for start in range(0, len(shuffled), settings.batch):
            batch = shuffled[start : start + settings.batch]
            loss = _loss(states[batch], final[batch], change, head, settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress is not None:
                seen = epoch * len(trained) + min(start + settings.batch, len(trained))
                progress("training", seen, settings.epochs * len(trained))
        checkpoint.save(epoch + 1, change.detach())
    total = torch.zeros(())
    with torch.no_grad():
        for batch in held.split(settings.batch):
            loss = _loss(states[batch], final[batch], change, head, settings)
            total += loss * len(batch)
    return change.detach(), float(total) / len(held)


def _shuffled(count: int, seed: int) -> torch.Tensor:
    """The numbers below `count` in an order that the seed gives."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)


def _loss(
    states: torch.Tensor,
    final: torch.Tensor,
    change: torch.Tensor,
    head: torch.Tensor,
    settings: ExitTraining,
) -> torch.Tensor:
    """Mean loss of N positions.

    Args:
        states: scaled hidden states at the exit layer, [N, H].
        final: hidden states before the head, [N, H].
        change: A, [H, H].
        head: U, [V, H].
        settings: of the training.
    """
    vocabulary = head.shape[0]
    with torch.no_grad():
        teacher = final @ head.T / settings.tau
        count = min(settings.candidates, vocabulary)
        candidates = teacher.topk(count, dim=-1).indices
    student = (states + states @ change) @ head.T / settings.tau
    whole = _divergence(teacher, student)
    among = _divergence(teacher.gather(1, candidates), student.gather(1, candidates))
    return settings.tau**2 * (whole + settings.weight * among)


def _divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean KL(softmax(teacher) || softmax(student)) over rows of logits [N, V]."""
    return F.kl_div(
        student.log_softmax(-1),
        teacher.log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


@dataclass(frozen=True)
class _Checkpoint:
    """An interrupted training's state after its last whole epoch."""

    path: Path
    key: str
    """What the training depends on; the state of another training is not used."""

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def load(self, hidden: int) -> tuple[int, torch.Tensor]:
        """(epochs done, A); a fresh start where there is nothing that fits."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                metadata, change = file.metadata() or {}, file.get_tensor("change")
            if metadata["key"] == self.key and change.shape == (hidden, hidden):
                logger.warning("%s: going on after %s epochs", self.path, metadata["epochs"])
                return int(metadata["epochs"]), change
        except (OSError, SafetensorError, KeyError, ValueError):
            pass
        return 0, torch.zeros(hidden, hidden)

    def save(self, epochs: int, change: torch.Tensor) -> None:
        """Raises: SpeculationError: it cannot be written."""
        from safetensors.torch import save

        metadata = {"key": self.key, "epochs": str(epochs)}
        data = save({"change": change.contiguous()}, metadata)
        write_file(self.path, data)
