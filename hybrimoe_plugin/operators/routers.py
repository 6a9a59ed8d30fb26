"""What the engine may ask of a model's own router, without touching the routing."""

from __future__ import annotations

from collections import deque

import torch
from torch import nn

WAITING = 8
"""Most calls of a gate that wait for their experts' call.

Hooks do not nest deeper, and of a gate that is called alone no more logits are kept.
"""


class GateRouter:
    """The router of a transformers 5.x MoE block.

    Its gate is called as `gate(hidden) -> (logits [T, E], weights [T, K], ids [T, K])`. A forward
    hook keeps the logits of each call until its experts are called; `detach` removes the hook.

    Between gate and experts a foreign hook may call the model again. Experts take the newest
    logits, so nested calls are matched from the inside out:

        gate(outer) -> [outer]; hook: gate(inner) -> [outer, inner]
                                      experts(inner) takes inner
        experts(outer) takes outer
    """

    def __init__(self, gate: nn.Module) -> None:
        self.gate = gate
        self._kept: deque[torch.Tensor] = deque(maxlen=WAITING)
        self._logits: torch.Tensor | None = None
        """Those of the experts' call that has taken them."""
        self._hook = gate.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> None:
        self._kept.append(output[0])

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
        correction = getattr(self.gate, "e_score_correction_bias", None)
        if correction is not None:
            return logits.sigmoid() + correction
        return logits.softmax(dim=-1)

    @torch.no_grad()
    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """Ids [T, K] that this router gives for hidden states [T, H] (paper section 4.3).

        Hooks are not called: for what observes the router, such as transformers'
        `output_router_logits`, this is not a call of the model.
        """
        ids: torch.Tensor = self.gate.forward(hidden)[2]
        return ids

    def recover(self) -> None:
        """Clear what an interrupted or failed pass has left."""
        self._kept.clear()
        self._logits = None

    def detach(self) -> None:
        self._hook.remove()
        self.recover()
