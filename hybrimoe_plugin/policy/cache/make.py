"""Cache policies by name."""

from __future__ import annotations

from hybrimoe_plugin.config import CACHES, Settings
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.cache.adaptive import AdaptiveCache
from hybrimoe_plugin.policy.cache.baselines import EMACache, LFUCache, LRUCache, StaticCache
from hybrimoe_plugin.policy.cache.mrs import MRSCache
from hybrimoe_plugin.policy.cache.ranked import CachePolicy, RankedCache, Ranks


def make_cache(
    name: str,
    layers: int,
    experts: int,
    top_k: int,
    settings: Settings,
    popularity: Ranks | None = None,
) -> CachePolicy:
    """The cache policy of that name.

    Args:
        popularity: [L, E] shares of earlier text to start from.

    Raises:
        ConfigError: unknown name.
    """
    if name == "adaptive":
        return AdaptiveCache(layers, experts, top_k, popularity)
    if name == "mrs":
        kept = settings.mrs_p or 2 * top_k
        return MRSCache(layers, experts, settings.mrs_alpha, kept, popularity)
    kinds: dict[str, type[RankedCache]] = {
        "lru": LRUCache,
        "lfu": LFUCache,
        "ema": EMACache,
        "static": StaticCache,
    }
    if name not in kinds:
        raise ConfigError(f"cache: expected one of {', '.join(CACHES)}, found {name!r}")
    return kinds[name](layers, experts, popularity)
