"""What the engine may ask of a model's own router, without touching the routing."""

from __future__ import annotations

import torch
from torch import nn


class GateRouter:
    """The router of a transformers 5.x MoE block: `gate(hidden) -> (logits [T, E], weights [T, K], ids [T, K])`.

    A forward hook keeps the logits of the running call; `detach` removes it.
    """

    def __init__(self, gate: nn.Module) -> None:
        self.gate = gate
        self._logits: torch.Tensor | None = None
        self._hook = gate.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> None:
        self._logits = output[0]

    def scores(self) -> torch.Tensor | None:
        """[T, E] float32, what the router chose by: sigmoid plus correction for DeepSeek-V3, else softmax."""
        if self._logits is None:
            return None
        logits = self._logits.detach().float().reshape(-1, self._logits.shape[-1])
        correction = getattr(self.gate, "e_score_correction_bias", None)
        if correction is not None:
            return logits.sigmoid() + correction
        return logits.softmax(dim=-1)

    @torch.no_grad()
    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """Ids [T, K] that this router gives for hidden states [T, H] (paper section 4.3).

        Hooks do not see it: to whoever watches the router, transformers' `output_router_logits` among them, it is no
        call of the model.
        """
        ids: torch.Tensor = self.gate.forward(hidden)[2]
        return ids

    def recover(self) -> None:
        """Clear what a pass has left that did not come to its end."""
        self._logits = None

    def detach(self) -> None:
        self._hook.remove()
        self._logits = None
