"""What a speculative run did: counts with defined meanings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SHOWN_POSITIONS = 10
"""Depths whose acceptance a report states."""


@dataclass
class Cycle:
    """One draft-and-verify cycle."""

    nodes: int
    """Nodes of the tree, the root included."""
    depth: int
    """Depth of its deepest node."""
    leaves: int
    kept: int
    """Nodes after early-exit pruning."""
    accepted: int
    """Drafted tokens that the target confirmed."""
    draft_us: float
    verify_us: float
    """The target pass: compute, and those reads that it had to wait for."""
    wait_us: float
    """Part of `verify_us` in which it waited for reads."""
    project_us: float
    """Output projection and sampling along the accepted path."""
    total_us: float
    predicted_us: float
    """What the cost model expected of `draft_us + verify_us` when it chose the tree."""
    nbytes: int
    """Read from flash during the cycle."""
    drafted: int = 0
    """Nodes that the draft expanded before the pass."""
    drafted_ahead: int = 0
    """Nodes that it expanded for the next cycle, while the pass waited for reads."""


@dataclass
class SpeculationStats:
    """A run of `generate`.

    `tokens` counts what was generated; the first comes from the prompt's own pass, which is no
    cycle.
    """

    draft: str = ""
    tree: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    prefill_us: float = 0.0
    label: str = "measured"
    """`measured`, or how reads were throttled."""
    cycles: list[Cycle] = field(default_factory=list)

    @property
    def target_passes(self) -> int:
        """Passes after the prompt's."""
        return len(self.cycles)

    @property
    def decode_tokens(self) -> int:
        """Tokens of the cycles, which are those that `decode_us` is the time of."""
        return sum(cycle.accepted + 1 for cycle in self.cycles)

    @property
    def decode_us(self) -> float:
        return sum(cycle.total_us for cycle in self.cycles)

    @property
    def tokens_per_s(self) -> float:
        """Decode only: tokens of the cycles over their time."""
        if not self.cycles:
            return 0.0
        return self.decode_tokens / self.decode_us * 1e6

    @property
    def acceptance_length(self) -> float:
        """Mean of 1 + accepted per cycle."""
        if not self.cycles:
            return 0.0
        return 1 + _mean(cycle.accepted for cycle in self.cycles)

    def position_acceptance(self) -> list[float]:
        """For each depth d, how often d or more drafted tokens were accepted.

        As a share of the cycles whose trees reach that deep.
        """
        deepest = max((cycle.depth for cycle in self.cycles), default=0)
        rates = []
        for depth in range(1, deepest + 1):
            reaching = [cycle for cycle in self.cycles if cycle.depth >= depth]
            rates.append(_mean(cycle.accepted >= depth for cycle in reaching))
        return rates

    def lines(self, device_gbps: float | None = None) -> list[str]:
        """A report for people.

        Args:
            device_gbps: what plain large direct reads of the pack reach, to state the share.
        """
        if not self.cycles:
            return [f"{self.tokens} tokens, no target pass after the prompt's"]
        rates = self.position_acceptance()[:SHOWN_POSITIONS]
        positions = " ".join(f"{rate:.0%}" for rate in rates) or "-"
        nodes = _mean(cycle.nodes for cycle in self.cycles)
        kept = _mean(cycle.kept for cycle in self.cycles)
        predicted = _mean(cycle.predicted_us for cycle in self.cycles)
        actual = _mean(cycle.draft_us + cycle.verify_us for cycle in self.cycles)
        return [
            f"speculation:          tree {self.tree}, draft {self.draft}, {self.label}",
            f"decode rate:          {self.tokens_per_s:.2f} tokens/s, {self.decode_tokens} tokens "
            f"in {self.decode_us / 1e6:.2f} s and {self.target_passes} target passes",
            f"acceptance length:    {self.acceptance_length:.2f} per pass; by position {positions}",
            f"tree nodes:           {nodes:.1f} mean, {kept:.1f} after early exit",
            f"flash reads:          {self._reads(device_gbps)}",
            f"time:                 {self._shares()}",
            f"cycle time:           {actual / 1e3:.0f} ms, predicted {predicted / 1e3:.0f} ms",
        ]

    def _reads(self, device_gbps: float | None) -> str:
        """Bytes and bandwidth over the decode time."""
        nbytes = sum(cycle.nbytes for cycle in self.cycles)
        gbps = nbytes / self.decode_us / 1e3
        text = f"{nbytes / 1e6:.0f} MB, {gbps:.2f} GB/s over the decode time"
        if not device_gbps:
            return text
        return f"{text} ({gbps / device_gbps:.0%} of the device's {device_gbps:.2f} GB/s)"

    def _shares(self) -> str:
        """Parts of the decode time."""
        wait_us = sum(cycle.wait_us for cycle in self.cycles)
        parts = {
            "draft": sum(cycle.draft_us for cycle in self.cycles),
            "waiting for reads": wait_us,
            "verify compute": sum(cycle.verify_us for cycle in self.cycles) - wait_us,
            "projection": sum(cycle.project_us for cycle in self.cycles),
        }
        return ", ".join(f"{name} {us / self.decode_us:.0%}" for name, us in parts.items())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
