"""A router's rule of choice."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rule(NamedTuple):
    """How a router makes of its logits a choice of experts and their weights."""

    is_sigmoid: bool
    """Scores are sigmoids of the logits, else their softmax."""
    is_normalised: bool
    """Weights are the scores divided by the sum of those chosen."""
    scale: float
    """And times this."""
    correction: torch.Tensor | None = None
    """[E] float32, added to the scores for the choice alone."""
