"""The line about the engine that follows an answer."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.policy.counters import Counters


def engine_line(counts: Counters, emulated: bool) -> str:
    """One line with the counters of one answer.

    Args:
        counts: since the answer began.
        emulated: whether the accelerator is emulated, which the line then says.
    """
    share = f" ({counts.hit_rate:.1%})" if counts.activations else ""
    line = (
        f"engine: cache hits {counts.cache_hits}/{counts.activations}{share}, "
        f"experts on CPU {counts.experts_cpu} / accelerator {counts.experts_accelerator} / "
        f"transferred {counts.transferred}, "
        f"prefetches used {counts.prefetches_used}/{counts.prefetches}"
    )
    return f"{line} [accelerator emulated]" if emulated else line


class EngineReport:
    """Gives the line for what happened since its last call.

    None for a model without an engine, and where only the CPU computes: there is nothing to plan.
    """

    def __init__(self, model: Any) -> None:
        self._handle = getattr(model, "hybrimoe", None)
        self._before: Counters | None = None

    def __call__(self) -> str | None:
        if self._handle is None or on_cpu_alone(self._handle):
            return None
        now: Counters = self._handle.stats()
        counts = now if self._before is None else now.since(self._before)
        self._before = now
        return engine_line(counts, bool(getattr(self._handle, "emulated", False)))

    def facts(self) -> list[str]:
        """Lines about everything since the model was loaded."""
        if self._handle is None:
            return []
        counts: Counters = self._handle.stats()
        if on_cpu_alone(self._handle):
            return [f"experts computed:     {counts.experts_cpu} on the CPU"]
        return [f"since loading, {engine_line(counts, bool(self._handle.emulated))}"]


def on_cpu_alone(handle: Any) -> bool:
    """Whether no engine of an injected model has an accelerator, real or emulated.

    Args:
        handle: what the model has as `hybrimoe`.
    """
    engines = getattr(handle, "engines", ())
    return bool(engines) and all(engine.accelerator is None for engine in engines)
