"""Expert cache policies: which experts are worth a slot.

A policy ranks the experts of every layer. The controller evicts the lowest rank: of the layer, or
of all layers where they share their slots.
"""

from hybrimoe_plugin.policy.cache.adaptive import AdaptiveCache
from hybrimoe_plugin.policy.cache.make import make_cache
from hybrimoe_plugin.policy.cache.ranked import CachePolicy, RankedCache

__all__ = ["AdaptiveCache", "CachePolicy", "RankedCache", "make_cache"]
