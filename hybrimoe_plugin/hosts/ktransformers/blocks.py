"""kTransformers' MoE blocks, which also show their router to the experts.

The computation is theirs, unchanged.
"""

from __future__ import annotations

import torch
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.operators.experts import (
    KDeepseekV2MoE,
    KDeepseekV3MoE,
    KMistralSparseMoEBlock,
    KQwen2MoeSparseMoeBlock,
)

from hybrimoe_plugin.hosts.ktransformers.operators import HybriMoEExperts


class _ShowsRouter(BaseInjectedModule):
    """Mixed into a block, before it."""

    def load(self) -> None:
        super().load()
        if isinstance(self.experts, HybriMoEExperts):
            self.experts.show_router(self.gate, self.config.num_experts_per_tok)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As the block: [B, T, H] from [B, T, H].

        The router's scores are kept for the experts, so both run in one turn.

        Raises as the experts' `forward`.
        """
        if not isinstance(self.experts, HybriMoEExperts):
            return super().forward(hidden_states)
        return self.experts.in_turn(super().forward, hidden_states)


class DeepseekV2MoE(_ShowsRouter, KDeepseekV2MoE):
    """For `DeepseekV2MoE`."""


class DeepseekV3MoE(_ShowsRouter, KDeepseekV3MoE):
    """For `DeepseekV3MoE`."""


class Qwen2MoeSparseMoeBlock(_ShowsRouter, KQwen2MoeSparseMoeBlock):
    """For `Qwen2MoeSparseMoeBlock`."""


class MixtralSparseMoeBlock(_ShowsRouter, KMistralSparseMoEBlock):
    """For `MixtralSparseMoeBlock`."""
