"""Plain values that every package shares; no torch, no devices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

OFFLOADED = math.inf
"""`Routed.ready_us` of an expert whose weights are neither resident nor in flight."""


class Routed(NamedTuple):
    """One expert that this layer call needs.

    It carries its own load, so that two lists are never joined by position.
    """

    expert: int
    load: int
    """Tokens of this call that chose the expert."""
    ready_us: float
    """When its weights can be used on the accelerator.

    0 for a resident expert, finite for one in flight, `OFFLOADED` for any other.
    """


class LayerPlan(NamedTuple):
    """Which device computes what in one layer call.

    Every routed expert is in exactly one of `cpu` and `accelerator`.
    """

    cpu: tuple[int, ...]
    """Experts that the CPU computes, in order."""
    accelerator: tuple[int, ...]
    """Experts that the accelerator computes, in order of start: resident, in flight, onloaded."""
    onload: tuple[int, ...]
    """Demand loads in link order; a subset of `accelerator`."""
    makespan_us: float
    """Predicted time until both sides have finished."""
    cpu_us: float
    """Predicted busy time of the CPU."""
    accelerator_us: float
    """Predicted busy time of the accelerator."""
    link_us: float
    """Predicted busy time of the link for this plan's demand loads."""


class ExpertRef(NamedTuple):
    """One expert of one layer."""

    layer: int
    expert: int


@dataclass(frozen=True)
class Activation:
    """What an expert computes between its two products, from gate [I] and up [I]:

    gate = min(gate, limit)
    up   = clamp(up, -limit, limit)
    f(gate) * (up + up_shift)
    """

    kind: str = "silu"
    """f: `silu` is x * sigmoid(alpha * x); the others are in `ACTIVATIONS`."""
    alpha: float = 1.0
    """Of silu only."""
    limit: float = 0.0
    """Bound of both, in their own units; 0 where nothing is clamped."""
    up_shift: float = 0.0


SILU = Activation()
"""SwiGLU as most families have it."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""Kinds of `Activation`: gelu is the exact one, gelu_tanh its approximation by a tanh."""


@dataclass(frozen=True)
class ExpertSpec:
    """Shape and storage of the routed experts of a model.

    One expert is three matrices: gate [I, H], up [I, H] and down [H, I].
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    gate_type: str
    """GGML type name, e.g. `Q4_K`; the most common one where a model's layers differ."""
    up_type: str
    down_type: str
    gate_bytes: int
    """Bytes of one expert's gate matrix as stored."""
    up_bytes: int
    down_bytes: int
    activation: Activation = SILU
    bias_bytes: int = 0
    """Bytes of one expert's biases; 0 in families whose experts have none."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert: its three stored matrices, and its biases."""
        return self.gate_bytes + self.up_bytes + self.down_bytes + self.bias_bytes
