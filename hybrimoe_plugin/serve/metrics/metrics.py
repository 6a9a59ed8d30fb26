"""Metrics of requests, under vLLM's names where vLLM has them too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.serve.metrics.engine import EngineCounters
from hybrimoe_plugin.serve.requests import End, Load, Observer, Reason, Request, Scheduling

REASONS = {
    Reason.STOP: "stop",
    Reason.LENGTH: "length",
    Reason.CANCELLED: "abort",
    Reason.FAILED: "error",
}
"""As vLLM calls them."""

_WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_BETWEEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STEP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics(Observer):
    """Counts what the scheduler tells, in a registry of its own.

    Args:
        name: the model's, the label `model_name`.
        stats: gives the engine's counters; None for a model without engine.
    """

    def __init__(self, name: str, stats: Callable[[], Counters] | None = None) -> None:
        self.registry = CollectorRegistry()
        self._name = name
        self._engine = None if stats is None else EngineCounters(stats, name)
        if self._engine is not None:
            self.registry.register(self._engine)
        self._add_loads()
        self._add_tokens()
        self._add_times()

    def _add_loads(self) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Answers being computed.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests in the queue.")
        self._kv_used = self._gauge(
            "vllm:kv_cache_usage_perc", "KV memory of running answers, 0 to 1 of the most."
        )
        self._kv_bytes = self._gauge("hybrimoe_kv_cache_bytes", "The same in bytes.")
        self._prefix_bytes = self._gauge("hybrimoe_prefix_cache_bytes", "Memory of kept prefixes.")

    def _add_tokens(self) -> None:
        self._queries = self._counter(
            "vllm:prefix_cache_queries", "Tokens of prompts that were looked up."
        )
        self._hits = self._counter("vllm:prefix_cache_hits", "Those that a kept prefix had.")
        self._prompts = self._counter("vllm:prompt_tokens", "Tokens of prompts, kept ones too.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens of answers.")
        self._prompt_lengths = self._histogram(
            "vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS
        )
        self._lengths = self._histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS
        )
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed in one pass.", _STEP
        )
        self._ends = Counter(
            "vllm:request_success",
            "Answers that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in REASONS.values():
            self._ends.labels(self._name, reason)

    def _add_times(self) -> None:
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "From the queue to the first token.", _WAITS
        )
        self._between = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of an answer.", _BETWEEN
        )
        self._per_token = self._histogram(
            "vllm:time_per_output_token_seconds", "The same, under its older name.", _BETWEEN
        )
        self._queue = self._histogram("vllm:request_queue_time_seconds", "In the queue.", _WAITS)
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From the queue to the end.", _WHOLE
        )

    async def refresh(self, scheduler: Scheduling) -> None:
        """Bring up to date what is asked for rather than told."""
        if self._engine is not None:
            await self._engine.refresh()
        self._show(scheduler.load())

    def _show(self, load: Load) -> None:
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._kv_used.set(load.kv_bytes / load.kv_limit if load.kv_limit else 0.0)
        self._kv_bytes.set(load.kv_bytes)
        self._prefix_bytes.set(load.prefix_bytes)

    def started(self, request: Request, waited_s: float, cached_tokens: int) -> None:
        length = len(request.prompt)
        self._queue.observe(waited_s)
        self._queries.inc(length)
        self._hits.inc(cached_tokens)
        self._prompts.inc(length)
        self._prompt_lengths.observe(length)

    def first_token(self, request: Request, since_queued_s: float) -> None:
        self._first.observe(since_queued_s)
        self._generated.inc()

    def next_token(self, request: Request, since_last_s: float) -> None:
        self._between.observe(since_last_s)
        self._per_token.observe(since_last_s)
        self._generated.inc()

    def ended(self, request: Request, end: End, since_queued_s: float) -> None:
        self._ends.labels(self._name, REASONS[end.reason]).inc()
        self._lengths.observe(end.tokens)
        self._whole.observe(since_queued_s)

    def step(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        self._step_tokens.observe(rows + prompt_tokens)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(name, about, ["model_name"], registry=self.registry).labels(self._name)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, ["model_name"], registry=self.registry).labels(self._name)

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            name, about, ["model_name"], registry=self.registry, buckets=buckets
        ).labels(self._name)
