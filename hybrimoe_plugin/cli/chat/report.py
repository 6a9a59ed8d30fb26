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
    """Gives the line for what happened since its last call; None for a model without an engine."""

    def __init__(self, model: Any) -> None:
        self._handle = getattr(model, "hybrimoe", None)
        self._before: Counters | None = None

    def __call__(self) -> str | None:
        if self._handle is None:
            return None
        now: Counters = self._handle.stats()
        counts = now if self._before is None else now.since(self._before)
        self._before = now
        return engine_line(counts, bool(getattr(self._handle, "emulated", False)))
