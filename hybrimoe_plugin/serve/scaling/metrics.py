"""One page of metrics for all replicas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "merged"]


def merged(texts: Mapping[str, str]) -> bytes:
    """All samples, each with the label `replica`.

    Args:
        texts: replica -> what its `/metrics` says.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(texts))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                known = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    known.samples.append(sample._replace(labels=labels))
        yield from families.values()
