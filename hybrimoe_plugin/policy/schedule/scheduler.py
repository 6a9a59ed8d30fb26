"""The interface of every scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hybrimoe_plugin.core import OFFLOADED, LayerPlan, Routed


class Scheduler(Protocol):
    """Decides which side computes each routed expert of one layer call."""

    name: str
    few_rows: Scheduler | None = None
    """The same one with the costs of calls of a few rows, where they are others."""

    def for_rows(self, few: bool) -> Scheduler:
        """The scheduler of a call, which may be one of a few rows."""
        return self.few_rows if few and self.few_rows is not None else self

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        """Assign every routed expert exactly once.

        Args:
            routed: the experts that this call needs.
            link_free_us: the link is busy with earlier transfers until then.
        """
        ...

    def makespan_us(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> float:
        """Predicted time of the plan, where nobody needs to know who computes what."""
        return self.plan(routed, link_free_us).makespan_us

    def even_makespan_us(self, missing: int, present: int, load: int) -> float:
        """The same for an idle link and so many offloaded and resident experts of equal load."""
        routed = [Routed(expert, load, OFFLOADED) for expert in range(missing)]
        routed += [Routed(missing + expert, load, 0.0) for expert in range(present)]
        return self.makespan_us(routed)


@dataclass
class Schedulers:
    """The two schedulers of a model; they differ where only one kind of call has an accelerator."""

    prefill: Scheduler
    """For prompts."""
    decode: Scheduler
    """For calls of one token, or of a few rows."""

    def for_call(self, many: bool) -> Scheduler:
        return self.prefill if many else self.decode
