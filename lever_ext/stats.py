"""What a speculative run did: counts with defined meanings."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Cycle:
    """One draft-and-verify cycle."""

    rows: int
    """Rows of the tree, the root included."""
    depth: int
    """Depth of its deepest node."""
    leaves: int
    kept: int
    """Rows after early-exit pruning."""
    accepted: int
    """Drafted tokens that the target confirmed."""
    draft_us: float
    verify_us: float
    """The target pass: compute and what of the reads it had to wait for."""
    wait_us: float
    """Of `verify_us`, time that stood still for reads."""
    project_us: float
    """Output projection and sampling along the accepted path."""
    total_us: float
    predicted_us: float
    """What the cost model expected of `draft_us + verify_us` when it chose the tree."""
    nbytes: int
    """Read from flash during the cycle."""
    drafted: int = 0
    """Nodes that the draft expanded before the pass."""
    ahead: int = 0
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
    def decode_us(self) -> float:
        return sum(cycle.total_us for cycle in self.cycles)

    @property
    def tokens_per_s(self) -> float:
        """Decode only: tokens of the cycles over their time."""
        made = sum(cycle.accepted + 1 for cycle in self.cycles)
        return made / self.decode_us * 1e6 if self.cycles else 0.0

    @property
    def acceptance_length(self) -> float:
        """Mean of 1 + accepted per cycle."""
        return (
            1 + sum(cycle.accepted for cycle in self.cycles) / len(self.cycles)
            if self.cycles
            else 0.0
        )

    def position_acceptance(self) -> list[float]:
        """For each depth d, the share of trees reaching that deep of which d drafted tokens or more
        were accepted.
        """
        rates = []
        for depth in range(1, max((cycle.depth for cycle in self.cycles), default=0) + 1):
            reaching = [cycle for cycle in self.cycles if cycle.depth >= depth]
            rates.append(sum(cycle.accepted >= depth for cycle in reaching) / len(reaching))
        return rates

    def lines(self, device_gbps: float | None = None) -> list[str]:
        """A report for people.

        Args:
            device_gbps: what plain large direct reads of the pack reach, to state the share.
        """
        if not self.cycles:
            return [f"{self.tokens} tokens, no target pass after the prompt's"]
        total, count = self.decode_us, len(self.cycles)
        nbytes = sum(cycle.nbytes for cycle in self.cycles)
        gbps = nbytes / total / 1e3
        share = (
            ""
            if not device_gbps
            else f" ({gbps / device_gbps:.0%} of the device's {device_gbps:.2f} GB/s)"
        )
        positions = " ".join(f"{rate:.0%}" for rate in self.position_acceptance()[:10])
        parts = {
            "draft": sum(cycle.draft_us for cycle in self.cycles),
            "waiting for reads": sum(cycle.wait_us for cycle in self.cycles),
            "verify compute": sum(cycle.verify_us - cycle.wait_us for cycle in self.cycles),
            "projection": sum(cycle.project_us for cycle in self.cycles),
        }
        predicted = sum(cycle.predicted_us for cycle in self.cycles) / count
        actual = sum(cycle.draft_us + cycle.verify_us for cycle in self.cycles) / count
        return [
            f"speculation:          tree {self.tree}, draft {self.draft}, {self.label}",
            f"decode rate:          {self.tokens_per_s:.2f} tokens/s, {count} target passes for "
            f"{self.tokens} tokens",
            f"acceptance length:    {self.acceptance_length:.2f} per pass; by position "
            f"{positions or '-'}",
            f"tree rows:            {sum(cycle.rows for cycle in self.cycles) / count:.1f} mean, "
            f"{sum(cycle.kept for cycle in self.cycles) / count:.1f} after early exit",
            f"flash reads:          {nbytes / 1e6:.0f} MB, {gbps:.2f} GB/s over the decode "
            f"time{share}",
            "time:                 "
            + ", ".join(f"{name} {us / total:.0%}" for name, us in parts.items()),
            f"cycle time:           {actual / 1e3:.0f} ms, predicted {predicted / 1e3:.0f} ms",
        ]
