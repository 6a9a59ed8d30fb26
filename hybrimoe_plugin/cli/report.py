"""The engine's own line after an answer."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.policy.counters import Counters


def engine_line(counts: Counters, emulated: bool) -> str:
    """One line from the counters of one answer.

    Args:
        counts: since the answer began.
        emulated: whether the accelerator is one on paper; the line then says so.
    """
    share = f" ({counts.hit_rate:.1%})" if counts.activations else ""
    line = (
        f"engine: cache hits {counts.cache_hits}/{counts.activations}{share}, "
        f"experts on CPU {counts.experts_cpu} / accelerator {counts.experts_accelerator} / "
        f"transferred {counts.transferred}, prefetches used "
        f"{counts.prefetches_used}/{counts.prefetches}"
    )
    return f"{line} [accelerator emulated]" if emulated else line


class EngineReport:
    """Gives the line of what happened since it was last asked; nothing for a model without an
    engine.
    """

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
