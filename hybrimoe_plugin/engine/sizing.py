"""How many experts fit: slots per layer, staging slots, and what attention's cache will take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.memory import RESERVE, human
from hybrimoe_plugin.errors import BudgetError

STAGING_SLOTS = 4
"""Two waves of two demand loads: one is computed while the other arrives. The fewest that a run can
do with.
"""


MOST_STAGING_SLOTS = 32
"""Long prompts stream whole layers through the staging slots: larger waves cost fewer launches."""


DEFAULT_EMULATED_RATIO = 0.25
"""Cache ratio of the emulated accelerator, which has no memory of its own to size it by: the
papers' smallest.
"""


def staging_slots(slots: int) -> int:
    """Staging slots beside about `slots` cached experts: a sixteenth of them, within limits."""
    return max(STAGING_SLOTS, min(MOST_STAGING_SLOTS, slots // 16))


def kv_cache_bytes(config: Any, context: int, latent: bool = False) -> int:
    """Memory that attention keeps for `context` tokens of one sequence, all layers, 16-bit values.

    Args:
        config: a transformers model config; what it does not say counts as nothing.
        latent: latent attention keeps latents, and prompts expand those of one layer at a time.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return 0
    layers = int(config.num_hidden_layers)
    if getattr(config, "kv_lora_rank", None):  # DeepSeek's
        expanded = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        rows = config.kv_lora_rank + config.qk_rope_head_dim
        values = layers * rows + expanded if latent else layers * expanded
    else:
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        values = 2 * (getattr(config, "num_key_value_heads", None) or heads) * width * layers
    return 2 * values * context


def cache_quotas(
    settings: Settings, experts: int, layer_bytes: Sequence[int], free_bytes: int | None
) -> list[int]:
    """Cached experts per MoE layer.

    An explicit `cache_ratio` or `cache_bytes` is met or refused; without one the cache takes what
    is free.

    Args:
        experts: routed experts per layer.
        layer_bytes: bytes of one expert, for each MoE layer; slots are as large as the largest.
        free_bytes: accelerator memory that experts may take, `None` where it is not limited
            (emulated).

    Raises:
        BudgetError: the explicit budget does not fit, or not even the staging slots do.
    """
    layers, slot_bytes = len(layer_bytes), max(layer_bytes)
    most = layers * experts
    if settings.cache_ratio is not None:
        wanted = round(settings.cache_ratio * experts) * layers
    elif settings.cache_bytes is not None:
        slots = settings.cache_bytes // slot_bytes
        wanted = min(most, slots - staging_slots(slots))
        if wanted < 0:
            raise BudgetError(
                f"cache_bytes {human(settings.cache_bytes)} is less than the {STAGING_SLOTS} "
                f"staging slots of "
                f"{human(slot_bytes)} that every run needs"
            )
    elif free_bytes is None:
        wanted = round(DEFAULT_EMULATED_RATIO * experts) * layers
    else:
        slots = int(free_bytes * (1 - RESERVE)) // slot_bytes
        wanted = min(most, slots - staging_slots(slots))
    staging = staging_slots(max(wanted, 0))
    needed = (max(wanted, 0) + staging) * slot_bytes
    if wanted < 0 or (free_bytes is not None and needed > free_bytes):
        raise BudgetError(
            f"{max(wanted, 0)} cached experts and {staging} staging slots of {human(slot_bytes)} "
            f"need "
            f"{human(needed)}, {human(free_bytes or 0)} are free: ask for a smaller cache_ratio "
            f"or cache_bytes"
        )
    return [wanted // layers + (1 if layer < wanted % layers else 0) for layer in range(layers)]
