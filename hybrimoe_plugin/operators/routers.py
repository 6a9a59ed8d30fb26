"""What the engine may ask of a model's own router, without touching the routing."""

from __future__ import annotations

import inspect
from collections import deque
from typing import Any

import torch
from torch import nn

WAITING = 8
"""Most calls of a gate that wait for their experts' call.

Hooks do not nest deeper, and of a gate that is called alone no more logits are kept.
"""


NAMES = ("router", "gate")
"""What transformers' families call the router. Where a block has both, `gate` is the linear layer
whose logits the router takes.
"""
_CORRECTIONS = ("e_score_correction_bias", "expert_bias")
"""Names of what is added to scores for the choice alone: of the gate's own or of its part's."""


def router_beside(parent: nn.Module) -> nn.Module | None:
    """The router in a module that holds routed experts; None where there is none."""
    found = (getattr(parent, name, None) for name in NAMES)
    return next((module for module in found if isinstance(module, nn.Module)), None)


class GateRouter:
    """The router of a transformers 5.x MoE block.

    Its gate is called as `gate(hidden, ...) -> (scores [T, E], weights [T, K], ids [T, K], ...)`,
    where scores are logits in most families. A forward hook keeps the scores of each call until its
    experts are called; `detach` removes the hook.

    Between gate and experts a foreign hook may call the model again. Experts take the newest
    scores, so nested calls are matched from the inside out:

        gate(outer) -> [outer]; hook: gate(inner) -> [outer, inner]
                                      experts(inner) takes inner
        experts(outer) takes outer
    """

    def __init__(self, gate: nn.Module, experts: int | None = None) -> None:
        self.gate = gate
        self._experts = experts
        """E; None where scores are known to have no others."""
        self._kept: deque[torch.Tensor] = deque(maxlen=WAITING)
        self._logits: torch.Tensor | None = None
        """Those of the experts' call that has taken them."""
        self._more: tuple[Any, ...] | None = None
        """What the last call was given beside hidden states; None before it."""
        self._more_by_name: dict[str, Any] = {}
        self._in_sequences = False
        """Whether the last call was given hidden states [B, T, H] instead of [T, H]."""
        self._takes_more = _arguments(gate) > 1
        self._gives_ids = not isinstance(gate, nn.Linear)
        """A plain linear gives logits only, and its block chooses by them."""
        self._corrected_by = _own_correction(gate)
        self._are_probabilities: bool | None = None
        """Whether the gate gives probabilities instead of logits; None until it was called."""
        self._hook = gate.register_forward_hook(self._called, with_kwargs=True)

    def _called(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        hidden, *more = args
        self._more, self._more_by_name = tuple(more), named
        self._in_sequences = hidden.ndim == 3
        self._keep(module, args, output)

    def _keep(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        parts = _tensors(output)
        self._gives_ids = not all(part.is_floating_point() for part in parts)
        for part in parts:
            if part.is_floating_point() and part.shape[-1] >= (self._experts or 1):
                self._kept.append(part)
                return

    def take(self, tokens: int) -> None:
        """Begin the experts' call for T tokens: from now on, `scores` are of its own router call.

        If no router call of that many tokens is waiting there are no scores: experts can be called
        without their gate. So can gates, which leave logits that nobody takes. Mutates.
        """
        self._logits = None
        while self._logits is None and self._kept:
            logits = self._kept.pop()
            if logits.numel() == tokens * logits.shape[-1]:
                self._logits = logits

    def scores(self) -> torch.Tensor | None:
        """[T, E] float32 by which the router chose experts; None without a router call.

        DeepSeek-V3 chooses by sigmoid plus correction, others by softmax. Callers that never use
        `take` ask once in each experts' call, and get the newest logits.
        """
        logits = self._logits
        if logits is None:
            if not self._kept:
                return None
            logits = self._kept.pop()
        logits = logits.detach().float().reshape(-1, logits.shape[-1])
        if self._experts is not None:
            # Some routers may choose to skip a token: the classes behind the experts.
            logits = logits[:, : self._experts]
        if self._are_probabilities is None:
            self._are_probabilities = _sum_to_one(logits)
        if self._are_probabilities:
            return logits
        correction = self._correction()
        if correction is not None:
            return logits.sigmoid() + correction
        return logits.softmax(dim=-1)

    @property
    def predicts(self) -> bool:
        """Whether `predict` can be asked now.

        A router that takes more than hidden states can if the rest was the same for all tokens when
        it was last called. What differs by token, such as its id, is not known ahead.
        """
        if not self._gives_ids:
            return False
        if self._more is None:
            return not self._takes_more
        given = (*self._more, *self._more_by_name.values())
        return all(item is None or _is_constant(item) for item in given)

    @torch.no_grad()
    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """Ids [T, K] that this router gives for hidden states [T, H] (paper section 4.3).

        Hooks are not called: for what observes the router, such as transformers'
        `output_router_logits`, this is not a call of the model. Needs `predicts`.
        """
        if self._in_sequences:
            hidden = hidden[None]
        ids = _ids(self.gate.forward(hidden, *(self._more or ()), **self._more_by_name))
        assert ids is not None, "`predicts` comes first"
        return ids.reshape(-1, ids.shape[-1])

    def recover(self) -> None:
        """Clear what an interrupted or failed pass has left."""
        self._kept.clear()
        self._logits = None

    def detach(self) -> None:
        self._hook.remove()
        self.recover()

    def _correction(self) -> torch.Tensor | None:
        """What is added to scores for the choice, [E]: the gate's own, or handed to its call."""
        if self._corrected_by is not None:
            module, name = self._corrected_by
            found: torch.Tensor = getattr(module, name)
            return found.flatten()
        given = (*(self._more or ()), *self._more_by_name.values())
        return next((item for item in given if _is_constant(item)), None)


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors that a gate gives, in whatever order a family or a release has them."""
    parts = output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _ids(output: Any) -> torch.Tensor | None:
    """The chosen experts among what a gate gives; None if it gives none."""
    whole = (part for part in _tensors(output) if not part.is_floating_point())
    return next(whole, None)


def _own_correction(gate: nn.Module) -> tuple[nn.Module, str] | None:
    """The module and the name under which a gate keeps its correction; None where it has none."""
    for module in gate.modules():
        for name in _CORRECTIONS:
            if isinstance(getattr(module, name, None), torch.Tensor):
                return module, name
    return None


def _arguments(gate: nn.Module) -> int:
    """Arguments that a gate's call takes."""
    # By its class: the module's own may be wrapped.
    parameters = inspect.signature(type(gate).forward).parameters
    return len(parameters) - 1


def _is_constant(value: Any) -> bool:
    """Whether an argument is one number for each expert, which no token changes."""
    return isinstance(value, torch.Tensor) and value.ndim == 1 and value.is_floating_point()


def _sum_to_one(rows: torch.Tensor) -> bool:
    """Whether rows [T, E] are probabilities."""
    sums = rows.sum(dim=-1)
    return bool((rows >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3))
