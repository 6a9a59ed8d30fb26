"""All tree policies side by side on one kind of prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from eval.lever.cell import BLANK, Row
from eval.lever.lab import Lab, OthersLoad
from eval.lever.trees import DENSE_TREES, make_decoder
from eval.lever.turns import Lane, own_state, run_together
from lever_ext.decoding import LeverDecoding
from lever_ext.flash.pack import FlashPack, block_memory
from lever_ext.speculation.stats import SpeculationStats
from lever_ext.target import FlashTarget
from lever_ext.tree.policies import Chain

CALM = 0.15
"""A run in which other programs took more than this share of the processor is repeated."""
ATTEMPTS = 2
WARM_UP = 12
"""Tokens of the turn that does not count."""
PLAIN_TOKENS = 10
"""Most tokens of plain decoding, which is slow."""
DENSE_BUDGET, MOE_BUDGET = "200MiB", "600MiB"


@dataclass(frozen=True)
class TreeCell:
    """All tree policies side by side on one kind of prompt."""

    name: str
    target: str = "dense"
    draft: str = "low-bit 65 %"
    prompt: str = "code"
    trees: tuple[str, ...] = DENSE_TREES
    tokens: int = 40
    rounds: int = 3
    """Texts that count, each of the next prompt of the kind. The policies decode it side by side,
    cycle by cycle.
    """
    share: float = -1.0
    """Of layers in DRAM; below 0 the target's own budget."""
    throttle: str = ""

    def run(self, lab: Lab) -> Iterator[Row]:
        """One row for each tree."""
        # Throttled profiles are faster than this machine's disk: their bytes come from the page
        # cache.
        target = lab.target(self.target, self._budget(lab), self.throttle, direct=not self.throttle)
        draft = lab.draft(self.draft)

        def decoder(tree: str, target: FlashTarget) -> LeverDecoding:
            return make_decoder(tree, target, own_state(draft))

        lanes = [Lane(target, partial(decoder, tree)) for tree in self.trees]
        runs: list[list[SpeculationStats]] = [[] for _ in lanes]
        load = 0.0
        for turn in range(self.rounds + 1):
            others = self._together(lanes, turn, lab.prompt(self.prompt, turn - 1))
            if turn:
                load = max(load, others)
                for kept, lane in zip(runs, lanes, strict=True):
                    kept.append(lane.decoder.stats)
        agreement = _agreement(lanes)
        for tree, lane, kept in zip(self.trees, lanes, runs, strict=True):
            lane.decoder.close()
            row = {**BLANK, **self._row(tree, kept)}
            yield {**row, "agreement": agreement, "others_cpu": round(load, 3), "value": ""}

    def _budget(self, lab: Lab) -> str | int:
        if self.share < 0:
            return DENSE_BUDGET if self.target == "dense" else MOE_BUDGET
        pack = FlashPack.open(lab.pack(self.target))
        layers = pack.blocks("layer")
        fixed = sum(block.nbytes for block in pack.blocks("resident"))
        pack.close()
        in_dram = round(self.share * len(layers))
        ring = 0 if self.share >= 1 else 3
        return fixed + (in_dram + ring) * block_memory(layers)

    def _together(self, lanes: Sequence[Lane], turn: int, inputs: Any) -> float:
        """All policies on one text; the share of the processor that other programs took meanwhile.

        The first turn warms up on another text: costs and calibration are learned in it.
        """
        count = WARM_UP if turn == 0 else self.tokens
        tokens = []
        for lane in lanes:
            plain = lane.decoder.policy.name == "none"
            tokens.append(min(count, PLAIN_TOKENS) if plain else count)
        shift = turn * (len(lanes) // 2 + 1)
        order = [(place + shift) % len(lanes) for place in range(len(lanes))]
        if turn % 2 == 0:
            order.reverse()
        for _ in range(ATTEMPTS):
            load = OthersLoad()
            run_together(lanes, order, tokens, inputs)
            others = load.share()
            if others < CALM:
                break
        return others

    def _row(self, tree: str, runs: Sequence[SpeculationStats]) -> Row:
        cycles = [cycle for run in runs for cycle in run.cycles]
        made = SpeculationStats(cycles=cycles)
        passes = len(cycles)
        label = runs[0].label
        if self.throttle:
            label = f"{label}, from the page cache"

        def mean(name: str) -> float:
            return sum(getattr(cycle, name) for cycle in cycles) / passes

        def mean_ms(name: str) -> float:
            return round(mean(name) / 1e3, 2)

        return {
            "target": self.target,
            "draft": self.draft,
            "prompt": self.prompt,
            "dram_share": self.share,
            "label": label,
            "tree": tree,
            "tokens": made.decode_tokens,
            "tokens_per_s": round(made.tokens_per_s, 4),
            "acceptance_length": round(made.acceptance_length, 3),
            "passes": passes,
            "rows": round(mean("nodes"), 1),
            "draft_ms": mean_ms("draft_us"),
            "verify_ms": mean_ms("verify_us"),
            "wait_ms": mean_ms("wait_us"),
            "project_ms": mean_ms("project_us"),
            "cycle_ms": mean_ms("total_us"),
            "predicted_ms": mean_ms("predicted_us"),
            "read_mb": round(mean("nbytes") / 1e6, 1),
        }


def _agreement(lanes: Sequence[Lane]) -> float:
    """How often the draft's first choice is the target's: a chain follows it at every token."""
    chain = next(lane for lane in lanes if isinstance(lane.decoder.policy, Chain))
    seen = chain.decoder.calibration
    return round(seen.agreed / max(1, seen.seen), 3)
