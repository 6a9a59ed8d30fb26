"""Metrics of all replicas on one page."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hybrimoe_plugin.serve.scaling.metrics import merged


def page(running: int) -> str:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Running.", ["model"], registry=registry).labels("m").set(
        running
    )
    Counter("vllm:prompt_tokens", "Tokens.", registry=registry).inc(3)
    Histogram("seconds", "Time.", buckets=(1.0, 2.0), registry=registry).observe(1.5)
    return generate_latest(registry).decode()


def test_every_sample_is_there_with_its_replica() -> None:
    pages = {"a": page(1), "b": page(2)}
    told = list(text_string_to_metric_families(merged(pages).decode()))
    kept = {}
    for family in told:
        for sample in family.samples:
            labels = dict(sample.labels)
            kept[(labels.pop("replica"), sample.name, *labels.items())] = sample.value
    expected = {}
    for replica, text in pages.items():
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                expected[(replica, sample.name, *sample.labels.items())] = sample.value
    assert kept == expected


def test_types_and_texts_stay_and_are_told_once() -> None:
    text = merged({"a": page(1), "b": page(2)}).decode()
    for line in (
        "# TYPE vllm:num_requests_running gauge",
        "# TYPE vllm:prompt_tokens_total counter",
        "# HELP vllm:prompt_tokens_total Tokens.",
        "# TYPE seconds histogram",
    ):
        assert text.count(line + "\n") == 1
