"""`/metrics`: vLLM's names for what vLLM has, the engine's counters, and no waiting for a pass."""

from __future__ import annotations

import asyncio
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from asking import ask
from prometheus_client.parser import text_string_to_metric_families
from serving import scripted, served, wait_until

from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.serve.http.layers import Access
from hybrimoe_plugin.serve.metrics import engine
from hybrimoe_plugin.serve.metrics.engine import EngineCounters
from hybrimoe_plugin.serve.metrics.metrics import REASONS, Metrics
from hybrimoe_plugin.serve.requests import End, Load, Reason, Request

COUNTERS = Counters(
    calls=2,
    activations=10,
    cache_hits=7,
    experts_cpu=4,
    experts_accelerator=6,
    prefetches=3,
    prefetches_used=2,
    link_bytes=1024,
    plan_us=5e5,
)


def read(text: str) -> dict[str, float]:
    """Name and labels but the model's -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            assert sample.labels["model_name"] == "m", sample
            found[f"{sample.name}{labels or ''}"] = sample.value
    return found


def shown(metrics: Metrics) -> dict[str, float]:
    """What a server shows of them."""
    service = replace(scripted(), metrics=metrics)
    with served(service, Access("127.0.0.1")) as port:
        answer = ask(port, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return read(answer.text)


def test_requests_are_counted_under_vllms_names() -> None:
    metrics = Metrics("m")
    request = Request("r", (1, 2, 3, 4))
    metrics.queued(request)
    metrics.started(request, 0.5, 3)
    metrics.step(0, 1, 0.1)
    metrics.first_token(request, 0.6)
    metrics.next_token(request, 0.1)
    metrics.step(2, 0, 0.1)
    metrics.ended(request, End(Reason.LENGTH, 2), 0.8)
    found = shown(metrics)
    assert found["vllm:prompt_tokens_total"] == found["vllm:prefix_cache_queries_total"] == 4
    assert found["vllm:prefix_cache_hits_total"] == 3
    assert found["vllm:generation_tokens_total"] == 2
    assert found["vllm:request_success_total{'finished_reason': 'length'}"] == 1
    assert found["vllm:request_success_total{'finished_reason': 'stop'}"] == 0
    sums = {
        "vllm:request_queue_time_seconds": 0.5,
        "vllm:time_to_first_token_seconds": 0.6,
        "vllm:inter_token_latency_seconds": 0.1,
        "vllm:time_per_output_token_seconds": 0.1,
        "vllm:e2e_request_latency_seconds": 0.8,
        "vllm:request_prompt_tokens": 4,
        "vllm:request_generation_tokens": 2,
        "vllm:iteration_tokens_total": 3,
    }
    for name, value in sums.items():
        assert found[f"{name}_sum"] == pytest.approx(value), name


def all_shown() -> dict[str, float]:
    """With a request that ended, and with counters of an engine."""
    metrics = Metrics("m", lambda: COUNTERS)
    metrics.ended(Request("r", (1,)), End(Reason.STOP, 1), 0.1)
    return shown(metrics)


def text_of_page() -> str:
    return (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text("utf-8")


def test_every_end_has_a_reason() -> None:
    assert set(REASONS) == set(Reason)


def test_the_load_is_that_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics("m")
    service = replace(scripted(), metrics=metrics)
    with served(service, Access("127.0.0.1")) as port:
        monkeypatch.setattr(service.scheduler, "load", lambda: Load(2, 5, 30, 40, 7, 9))
        found = read(ask(port, "/metrics").text)
    assert found["vllm:num_requests_running"] == 2
    assert found["vllm:num_requests_waiting"] == 5
    assert found["vllm:kv_cache_usage_perc"] == 0.75
    assert found["hybrimoe_kv_cache_bytes"] == 30
    assert found["hybrimoe_prefix_cache_bytes"] == 7


def test_the_engine_shows_its_counters() -> None:
    found = shown(Metrics("m", lambda: COUNTERS))
    assert found["hybrimoe_expert_hits_total"] == 7
    assert found["hybrimoe_expert_misses_total"] == 3
    assert found["hybrimoe_experts_computed_total{'place': 'cpu'}"] == 4
    assert found["hybrimoe_experts_computed_total{'place': 'accelerator'}"] == 6
    assert found["hybrimoe_link_bytes_total"] == 1024
    assert found["hybrimoe_prefetches_used_total"] == 2
    assert found["hybrimoe_plan_seconds_total"] == 0.5


def test_the_documented_names_are_those_that_are_served() -> None:
    documented = set(re.findall(r"^\| `((?:vllm:|hybrimoe_)\w+)` \|", text_of_page(), re.MULTILINE))
    ending = re.compile(r"(_bucket|_sum|_count)?(\{.*)?$")
    found = {ending.sub("", name, 1) for name in all_shown()}
    assert documented == {name for name in found if "_created" not in name}


def test_openmetrics_is_spoken_where_it_is_asked_for() -> None:
    with served(replace(scripted(), metrics=Metrics("m")), Access("127.0.0.1")) as port:
        answer = ask(port, "/metrics", {"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_without_metrics_there_are_none() -> None:
    with served(scripted(), Access("127.0.0.1")) as port:
        assert ask(port, "/metrics").status == 404


def kept(counters: EngineCounters) -> int:
    return counters._kept.calls


def test_a_running_pass_does_not_hold_a_scrape_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The former counters are shown, one thread waits, and what it reads is shown later."""
    monkeypatch.setattr(engine, "_WAIT_SECONDS", 0.01)
    ended = threading.Event()
    readers = []

    def stats() -> Counters:
        readers.append(threading.current_thread())
        assert ended.wait(30)
        return COUNTERS

    async def scrape() -> None:
        counters = EngineCounters(stats, "m")
        await asyncio.gather(*(counters.refresh() for _ in range(20)))
        await counters.refresh()
        assert kept(counters) == 0 and len(readers) == 1
        ended.set()
        while kept(counters) == 0:
            await counters.refresh()
        assert kept(counters) == COUNTERS.calls

    asyncio.run(scrape())


def test_counters_are_read_once_a_second_at_most() -> None:
    calls = []

    async def scrape() -> None:
        counters = EngineCounters(lambda: calls.append(1) or COUNTERS, "m")
        for _ in range(5):
            await counters.refresh()

    asyncio.run(scrape())
    assert len(calls) == 1


def test_counters_that_cannot_be_read_leave_the_former_ones() -> None:
    answers = [COUNTERS]

    async def scrape() -> None:
        counters = EngineCounters(answers.pop, "m")
        await counters.refresh()
        counters._read_at -= 10
        await counters.refresh()
        assert kept(counters) == COUNTERS.calls

    asyncio.run(scrape())


def test_metrics_are_answered_while_answers_run() -> None:
    service = replace(scripted(0.01), metrics=Metrics("m"))
    with served(service, Access("127.0.0.1")) as port:
        asking = threading.Thread(target=ask, args=(port, "/v1/stream", None, {}))
        asking.start()
        wait_until(lambda: service.scheduler.requests)  # type: ignore[attr-defined]
        assert ask(port, "/metrics").status == 200
        asking.join()
