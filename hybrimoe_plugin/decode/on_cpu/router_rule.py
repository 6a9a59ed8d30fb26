"""Find out by trial how a router makes of its logits a choice of experts and their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.cpu.native.rule import Rule

_ROWS = 64
_CORRECTION = "e_score_correction_bias"
_CLOSE = 1e-4


@torch.no_grad()
def rule_of(router: Any, top_k: int) -> Rule | None:
    """A router's rule; None where it follows none of those that a graph knows.

    Routers of random hidden states must choose as the rule does, with the same weights.

    Args:
        router: gives ids [T, K] and weights [T, K], among others, from hidden states [T, H].
    """
    weight: Any = getattr(router, "weight", None)
    if not _is_plain(weight) or weight.ndim != 2:
        return None
    correction = correction_of(router)
    if correction is not None and not _is_plain(correction):
        return None
    random = torch.Generator("cpu").manual_seed(0)
    hidden = weight.new_empty(_ROWS, weight.shape[1]).normal_(generator=random)
    try:
        found = _choices(router.forward(hidden), top_k)
    except Exception:  # a router of another kind may raise anything
        return None
    if found is None:
        return None
    ids, weights = found
    logits = F.linear(hidden, weight)
    for is_sigmoid in (False, True):
        scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
        ranked = scores if correction is None else scores + correction
        if not torch.equal(ranked.topk(top_k, -1).indices.sort(-1).values, ids.sort(-1).values):
            continue
        chosen = scores.gather(1, ids)
        for is_normalised in (True, False):
            wanted = chosen / chosen.sum(-1, keepdim=True) if is_normalised else chosen
            scale = float((weights / wanted).mean())
            if torch.allclose(weights, scale * wanted, rtol=_CLOSE, atol=0):
                return Rule(is_sigmoid, is_normalised, scale, correction)
    return None


def correction_of(router: Any) -> Any:
    """What it adds to scores for the choice alone; None if nothing."""
    return getattr(router, _CORRECTION, None)


def _is_plain(values: Any) -> bool:
    """Whether a graph can read them where they lie."""
    if not isinstance(values, torch.Tensor):
        return False
    return values.dtype == torch.float32 and values.is_contiguous() and values.device.type == "cpu"


def _choices(output: Any, top_k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(ids, weights) among what a router gives."""
    parts = [part for part in output if isinstance(part, torch.Tensor)]
    shaped = [part for part in parts if part.shape == (_ROWS, top_k)]
    ids = [part for part in shaped if not part.is_floating_point()]
    weights = [part for part in shaped if part.is_floating_point()]
    if len(ids) != 1 or len(weights) != 1:
        return None
    return ids[0].long(), weights[0].float()
