"""Prefetching: which predicted experts to load before their layer runs."""

from hybrimoe_plugin.policy.prefetch.confidence import Confidence
from hybrimoe_plugin.policy.prefetch.impact import ImpactPrefetcher
from hybrimoe_plugin.policy.prefetch.make import make_prefetcher
from hybrimoe_plugin.policy.prefetch.prediction import Prediction, Prefetcher, PrefetchRequest
from hybrimoe_plugin.policy.prefetch.score import ScorePrefetcher

__all__ = [
    "Confidence",
    "ImpactPrefetcher",
    "Prediction",
    "PrefetchRequest",
    "Prefetcher",
    "ScorePrefetcher",
    "make_prefetcher",
]
