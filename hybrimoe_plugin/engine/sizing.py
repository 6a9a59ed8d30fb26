"""How many experts fit: slots per layer, staging slots, and what attention's cache will take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.memory import RESERVE, human
from hybrimoe_plugin.errors import BudgetError

STAGING_SLOTS = 4
"""The fewest staging slots that a run needs: two waves of two demand loads.

One wave is computed while the other arrives.
"""

MOST_STAGING_SLOTS = 32
"""Long prompts stream whole layers through the staging slots: larger waves cost fewer launches."""

DEFAULT_EMULATED_RATIO = 0.25
"""Cache ratio of the emulated accelerator, which has no memory to size it by.

It is the smallest of the papers'.
"""


def staging_slots(slots: int) -> int:
    """Staging slots beside about `slots` cached experts: a sixteenth of them, within limits."""
    wanted = slots // 16
    return max(STAGING_SLOTS, min(MOST_STAGING_SLOTS, wanted))


def kv_cache_bytes(config: Any, context: int, latent: bool = False, value_bytes: int = 2) -> int:
    """Bytes that attention keeps for one sequence of `context` tokens.

    Args:
        config: a transformers model config; what it does not say counts as nothing.
        latent: latent attention keeps latents, and prompts expand those of one layer at a time.
        value_bytes: of one key's or value's number.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return 0
    layers = int(config.num_hidden_layers)
    if not getattr(config, "kv_lora_rank", None):
        values = sum(_keys_and_values(layer, heads) for layer in _each_layer(config, layers))
        return int(value_bytes * values * context)
    # DeepSeek's multi-head latent attention.
    key_width = config.qk_nope_head_dim + config.qk_rope_head_dim
    expanded = heads * (key_width + config.v_head_dim)
    values = layers * expanded
    if latent:
        latent_width = config.kv_lora_rank + config.qk_rope_head_dim
        values = layers * latent_width + expanded
    return int(value_bytes * values * context)


def _each_layer(config: Any, layers: int) -> list[Any]:
    """A config for each layer; in most models it is the model's own."""
    if not getattr(config, "is_heterogeneous", False):
        return [config] * layers
    return [config.per_layer_config[layer] for layer in range(layers)]


def _keys_and_values(config: Any, heads: int) -> int:
    """Numbers that one layer keeps of a token."""
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * key_value_heads * width)


def quotas_beside(
    on_cpu: Collection[int],
    settings: Settings,
    experts: int,
    layer_bytes: Sequence[int],
    free_bytes: int | None,
) -> list[int]:
    """As `cache_quotas`, with nothing for the layers that stay on the CPU. Raises: as it."""
    sizes = [size for layer, size in enumerate(layer_bytes) if layer not in on_cpu]
    quotas = iter(cache_quotas(settings, experts, sizes, free_bytes))
    return [0 if layer in on_cpu else next(quotas) for layer in range(len(layer_bytes))]


def cache_quotas(
    settings: Settings, experts: int, layer_bytes: Sequence[int], free_bytes: int | None
) -> list[int]:
    """Number of cached experts for each MoE layer.

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
    layers = len(layer_bytes)
    slot_bytes = max(layer_bytes)
    wanted = _wanted_experts(settings, experts, layers, slot_bytes, free_bytes)
    cached = max(wanted, 0)
    staging = staging_slots(cached)
    needed = (cached + staging) * slot_bytes
    if wanted < 0 or (free_bytes is not None and needed > free_bytes):
        raise BudgetError(
            f"{cached} cached experts and {staging} staging slots of {human(slot_bytes)} need "
            f"{human(needed)}, {human(free_bytes or 0)} are free: ask for a smaller cache_ratio "
            "or cache_bytes"
        )
    share, left_over = divmod(wanted, layers)
    return [share + 1] * left_over + [share] * (layers - left_over)


def _wanted_experts(
    settings: Settings, experts: int, layers: int, slot_bytes: int, free_bytes: int | None
) -> int:
    """Cached experts of all layers; negative where not even the staging slots fit.

    Raises:
        BudgetError: `cache_bytes` is less than the staging slots.
    """
    most = layers * experts
    if settings.cache_ratio is not None:
        return round(settings.cache_ratio * experts) * layers
    if settings.cache_bytes is not None:
        slots = settings.cache_bytes // slot_bytes
        wanted = min(most, slots - staging_slots(slots))
        if wanted < 0:
            raise BudgetError(
                f"cache_bytes {human(settings.cache_bytes)} is less than the {STAGING_SLOTS} "
                f"staging slots of {human(slot_bytes)} that every run needs"
            )
        return wanted
    if free_bytes is None:
        return round(DEFAULT_EMULATED_RATIO * experts) * layers
    slots = int(free_bytes * (1 - RESERVE)) // slot_bytes
    return min(most, slots - staging_slots(slots))
