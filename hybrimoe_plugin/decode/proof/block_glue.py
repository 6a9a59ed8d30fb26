"""Whether a block of routed experts is what a decode step computes from its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.decode.proof.stand_ins import (
    Called,
    StandIn,
    copy_with,
    random_hidden,
    same,
)
from hybrimoe_plugin.device.torch_threads import one_thread
from hybrimoe_plugin.operators.routers import NAMES

_EXPERTS = "experts"
_SHARED = ("shared_experts", "shared_expert")
_SHARED_GATE = "shared_expert_gate"


@dataclass(frozen=True)
class BlockGlue:
    """A block that is experts(x) by its router, + sigmoid(shared gate(x)) shared(x) if there."""

    router: str
    """Names of its children."""
    shared: str | None
    shared_gate: str | None


@one_thread()
def block_of(block: nn.Module) -> BlockGlue | None:
    """How a block puts its parts together; None where it is not of this form."""
    children = block._modules
    router = next((name for name in NAMES if name in children), None)
    if router is None or _EXPERTS not in children:
        return None
    shared = next((name for name in _SHARED if name in children), None)
    gate = _SHARED_GATE if _SHARED_GATE in children else None
    glue = BlockGlue(router, shared, gate)
    try:
        with torch.device("cpu"):
            return glue if _is_right(block, glue) else None
    except Exception:  # code that was not made for stand-ins may raise anything
        return None


class Router(StandIn):
    """Gives (logits, weights, ids) of two of eight experts."""

    def forward(self, hidden: torch.Tensor) -> Any:
        first = hidden.reshape(-1, hidden.shape[-1])[:, 0]
        logits = torch.sin(torch.outer(first, torch.arange(1.0, 9)))
        weights, ids = logits.topk(2, dim=-1)
        return logits, weights, ids


class Experts(StandIn):
    """Gives a function of a token, its experts and their weights."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden, ids, weights = (*args, *kwargs.values())
        scale = (weights * torch.cos(ids.float())).sum(-1, keepdim=True)
        return torch.sin(hidden + 0.4) * scale


@torch.no_grad()
def _is_right(block: nn.Module, glue: BlockGlue) -> bool:
    if getattr(block, "jitter_noise", 0):  # noise, while it trains
        return False
    calls: list[Called] = []

    def make(name: str, child: nn.Module) -> nn.Module:
        kinds = {glue.router: Router, _EXPERTS: Experts}
        return kinds.get(name, StandIn)(name, child, calls)

    made = copy_with(block, make)
    hidden = random_hidden(16)
    flat = hidden.view(-1, hidden.shape[-1])
    _, weights, ids = made._modules[glue.router](flat)
    wanted = made._modules[_EXPERTS](flat, ids, weights)
    if glue.shared is not None:
        scale: Any = 1.0
        if glue.shared_gate is not None:
            scale = made._modules[glue.shared_gate](flat).sigmoid()
        wanted = wanted + scale * made._modules[glue.shared](flat)
    return same(made.forward(hidden), wanted.view(hidden.shape))
