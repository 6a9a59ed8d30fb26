"""Training of the early-exit predictor, offline, with the target frozen (paper 2b).

    loss = tau^2 KL(softmax(z / tau) || softmax(W h / tau)) + lambda * the same KL over the draft's
    candidates

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
    weight: float = 1.0
    """lambda, of the loss over candidates."""
    candidates: int = 8
    epochs: int = 6
    batch: int = 128
    rate: float = 3e-4
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("tau", 0.1, 100),
            ("weight", 0, 100),
            ("rate", 1e-7, 1),
            ("held_out", 0.01, 0.5),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"{name}: expected {low} to {high}, found {getattr(self, name)!r}"
                )
        for name in ("candidates", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)!r}")


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
        ids: token ids of a text like what the target will say.
        output: the predictor's file; an interrupted training goes on from `output.partial`.
        layer: exit before this decoder layer; by default the middle one.

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
    partial = Path(f"{output}.partial")
    key = f"{target.pack.index.fingerprint} {layer} {len(ids)} {settings}"
    scale = _norm_scale(target.model) / found.hidden.float().pow(2).mean(-1).sqrt().mean()
    change, loss = _fit(found, head, scale, settings, _Checkpoint(partial, key), progress)
    weight = (head + head @ change.T) * scale
    predictor = ExitPredictor(
        weight.to(target.model.dtype), layer, loss, target.pack.index.fingerprint
    )
    predictor.save(output)
    partial.unlink(missing_ok=True)
    return predictor


def collect(
    target: FlashTarget, ids: Sequence[int], layer: int, progress: Progress | None = None
) -> Positions:
    """Run the target over a text in windows; hidden states at the exit layer and before the head.

    Raises:
        FlashError: the pack cannot be read.
    """
    operator = target.model.base_model.layers[layer]
    assert isinstance(operator, FlashDecoderLayer)
    hidden, final = list[torch.Tensor](), list[torch.Tensor]()
    hook = operator.register_forward_pre_hook(
        lambda _module, args: hidden.append(args[0][0].clone())
    )
    try:
        for start in range(0, len(ids), WINDOW):
            window = torch.tensor([ids[start : start + WINDOW]])
            with torch.no_grad():
                final.append(
                    target.model.base_model(window, use_cache=False).last_hidden_state[0].clone()
                )
            if progress is not None:
                progress("reading the text", min(start + WINDOW, len(ids)), len(ids))
    finally:
        hook.remove()
    return Positions(torch.cat(hidden), torch.cat(final))


def _norm_scale(model: Any) -> torch.Tensor:
    """[H], of the final norm; the states' own length becomes one number for all of them: the
    predictor is linear.
    """
    scale: torch.Tensor = model.base_model.norm.weight.detach().float()
    return scale


def _fit(
    found: Positions,
    head: torch.Tensor,
    scale: torch.Tensor,
    settings: ExitTraining,
    checkpoint: _Checkpoint,
    progress: Progress | None,
) -> tuple[torch.Tensor, float]:
    """(A [H, H], held-out loss)."""
    states, final = found.hidden.float() * scale, found.final.float()
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(states), generator=generator)
    held = order[: max(1, int(settings.held_out * len(order)))]
    trained = order[len(held) :]
    done, change = checkpoint.load(head.shape[1])
    change.requires_grad_(True)
    optimizer = torch.optim.Adam([change], lr=settings.rate)
    for epoch in range(done, settings.epochs):
        shuffled = trained[
            torch.randperm(len(trained), generator=torch.Generator().manual_seed(epoch))
        ]
        for start in range(0, len(shuffled), settings.batch):
            rows = shuffled[start : start + settings.batch]
            loss = _loss(states[rows], final[rows], change, head, settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress is not None:
                seen = epoch * len(trained) + min(start + settings.batch, len(trained))
                progress("training", seen, settings.epochs * len(trained))
        checkpoint.save(epoch + 1, change.detach())
    with torch.no_grad():
        parts = [
            _loss(states[rows], final[rows], change, head, settings) * len(rows)
            for rows in held.split(settings.batch)
        ]
    return change.detach(), float(sum(parts)) / len(held)


def _loss(
    states: torch.Tensor,
    final: torch.Tensor,
    change: torch.Tensor,
    head: torch.Tensor,
    settings: ExitTraining,
) -> torch.Tensor:
    """Mean loss of some positions."""
    with torch.no_grad():
        teacher = final @ head.T / settings.tau
        candidates = teacher.topk(min(settings.candidates, head.shape[0]), dim=-1).indices
    student = (states + states @ change) @ head.T / settings.tau
    whole = _divergence(teacher, student)
    among = _divergence(teacher.gather(1, candidates), student.gather(1, candidates))
    return settings.tau**2 * (whole + settings.weight * among)


def _divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean KL(softmax(teacher) || softmax(student)) of rows of logits."""
    return F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )


@dataclass(frozen=True)
class _Checkpoint:
    """An interrupted training's state after its last whole epoch."""

    path: Path
    key: str
    """What the training depends on; the state of another one is not taken."""

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

        data = save({"change": change.contiguous()}, {"key": self.key, "epochs": str(epochs)})
        write_file(self.path, data)
