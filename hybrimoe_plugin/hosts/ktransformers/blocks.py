"""kTransformers' MoE blocks, which besides computing show their router to the experts: for prefetch and cache scores.

The computation is theirs, unchanged.
"""

from __future__ import annotations

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


class DeepseekV2MoE(_ShowsRouter, KDeepseekV2MoE):
    """For `DeepseekV2MoE`."""


class DeepseekV3MoE(_ShowsRouter, KDeepseekV3MoE):
    """For `DeepseekV3MoE`."""


class Qwen2MoeSparseMoeBlock(_ShowsRouter, KQwen2MoeSparseMoeBlock):
    """For `Qwen2MoeSparseMoeBlock`."""


class MixtralSparseMoeBlock(_ShowsRouter, KMistralSparseMoEBlock):
    """For `MixtralSparseMoeBlock`."""
