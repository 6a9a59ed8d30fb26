"""What the engine may ask of a model's own router, without touching the routing."""

from __future__ import annotations

from collections import deque

import torch
from torch import nn

WAITING = 8
"""Most calls of one gate that wait for their experts: no hooks nest deeper, and a gate called alone
leaves no more.
"""


class GateRouter:
    """The router of a transformers 5.x MoE block: `gate(hidden) -> (logits [T, E], weights [T, K],
    ids [T, K])`.

    A forward hook keeps the logits of each call until its experts are called; `detach` removes it.
    In between a hook of somebody else's may call the model again: experts take the newest logits,
    so the calls inside come first.
    """

    def __init__(self, gate: nn.Module) -> None:
        self.gate = gate
        self._kept: deque[torch.Tensor] = deque(maxlen=WAITING)
        self._logits: torch.Tensor | None = None
        """Of the experts' call that has taken them."""
        self._hook = gate.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> None:
        self._kept.append(output[0])

    def take(self, tokens: int) -> None:
        """Begin the experts' call for T tokens: until the next one begins, `scores` are those of
        its own router call.

        Without a router call of that many tokens there are none: experts can be called alone, and
        so can gates, which leave logits that nobody takes. Mutates.
        """
        self._logits = None
        while self._logits is None and self._kept:
            logits = self._kept.pop()
            if logits.numel() == tokens * logits.shape[-1]:
                self._logits = logits

    def scores(self) -> torch.Tensor | None:
        """[T, E] float32, what the router chose by: sigmoid plus correction for DeepSeek-V3, else
        softmax.

        Who never calls `take` asks once in each experts' call, and is given the newest logits.
        """
        logits = self._logits
        if logits is None:
            if not self._kept:
                return None
            logits = self._kept.pop()
        logits = logits.detach().float().reshape(-1, logits.shape[-1])
        correction = getattr(self.gate, "e_score_correction_bias", None)
        if correction is not None:
            return logits.sigmoid() + correction
        return logits.softmax(dim=-1)

    @torch.no_grad()
    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """Ids [T, K] that this router gives for hidden states [T, H] (paper section 4.3).

        Hooks do not see it: to whoever watches the router, transformers' `output_router_logits`
        among them, it is no call of the model.
        """
        ids: torch.Tensor = self.gate.forward(hidden)[2]
        return ids

    def recover(self) -> None:
        """Clear what a pass has left that did not come to its end."""
        self._kept.clear()
        self._logits = None

    def detach(self) -> None:
        self._hook.remove()
        self.recover()
