"""The cells of `eval.lever`: what is run, and what is written down about each run."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval.lever_lab import PROMPTS, Lab, OthersLoad
from eval.lever_turns import Lane, own_state, run_together
from hybrimoe_plugin.demo import source_path
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.base import Draft
from lever_ext.early_exit.gate import ExitGate
from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings
from lever_ext.flash.pack import FlashPack, block_memory
from lever_ext.flash.reader import Buffer, plain_gbps
from lever_ext.speculation.stats import SpeculationStats
from lever_ext.target import FlashTarget
from lever_ext.tree.policies import (
    Chain,
    FixedBudget,
    Lever,
    NoSpeculation,
    OptTree,
    SpecInferTree,
    TreePolicy,
    make_policy,
)

CALM, ATTEMPTS = 0.15, 2
"""A run during which other programs took more of the processor than this is made again, so often at
most.
"""

TREES: dict[str, Callable[[], TreePolicy]] = {
    "flash autoregressive": NoSpeculation,
    "chain 8": lambda: Chain(8),
    "chain 4": lambda: Chain(4),
    "specinfer": SpecInferTree,
    "specinfer 4-2-2-1": lambda: SpecInferTree((4, 2, 2, 1, 1, 1)),
    "fixed 16": lambda: FixedBudget(16),
    "fixed 8": lambda: FixedBudget(8),
    "opt_tree 4": lambda: OptTree(4),
    "opt_tree 16": lambda: OptTree(16),
    "opt_tree 8": lambda: OptTree(8),
    "opt_tree 48": lambda: OptTree(48),
    "greedy": lambda: make_policy("greedy"),
    "lever": Lever,
    "lever, no overlap": Lever,
    "lever, cost without union": Lever,
}
WARM_UP = 12
"""Tokens of the turn that does not count."""
BUDGETS = {"dense": "200MiB", "mixtral": "600MiB"}
DENSE_TREES = ("flash "
               "autoregressive", "chain "
                                 "8", "specinfer", "specinfer 4-2-2-1", "fixed 16", "opt_tree 16",
               "opt_tree 48", "greedy", "lever, no overlap", "lever")  # fmt: skip
FEW_TREES = ("flash autoregressive", "chain 8", "specinfer", "fixed 16", "opt_tree 16", "lever")
MOE_TREES = ("flash "
             "autoregressive", "chain "
                               "8", "chain 4", "specinfer", "fixed 8", "opt_tree 4", "opt_tree 8",
             "opt_tree "
             "16", "greedy", "lever, cost without union", "lever, no overlap", "lever")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Something to run; `run` gives its rows."""

    name: str

    def run(self, lab: Lab) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


@dataclass(frozen=True)
class TreeCell(Cell):
    """All tree policies side by side on one kind of prompt."""

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

    def run(self, lab: Lab) -> Iterator[dict[str, Any]]:
        # Throttled profiles are faster than this machine's disk: their bytes come from the page
        # cache.
        target = lab.target(self.target, self._budget(lab), self.throttle, direct=not self.throttle)
        draft = lab.draft(self.draft)
        lanes = [
            Lane(target, lambda target, tree=tree: make_decoder(tree, target, own_state(draft)))  # type: ignore[misc]
            for tree in self.trees
        ]
        runs: list[list[SpeculationStats]] = [[] for _ in lanes]
        load = 0.0
        for turn in range(self.rounds + 1):
            others = self._together(lanes, turn, lab.prompt(self.prompt, turn - 1))
            if turn:
                load = max(load, others)
                for kept, lane in zip(runs, lanes, strict=True):
                    kept.append(lane.decoder.stats)
        chain = next(lane for lane in lanes if isinstance(lane.decoder.policy, Chain))
        seen = (
            chain.decoder.calibration
        )  # a chain follows the draft's first choice, which is what agreement is of
        agreement = round(seen.agreed / max(1, seen.seen), 3)
        for tree, lane, kept in zip(self.trees, lanes, runs, strict=True):
            lane.decoder.close()
            row = {**BLANK, **self._row(tree, kept)}
            yield {**row, "agreement": agreement, "others_cpu": round(load, 3), "value": ""}

    def _budget(self, lab: Lab) -> str | int:
        if self.share < 0:
            return BUDGETS[self.target]
        pack = FlashPack.open(lab.pack(self.target))
        layers = pack.blocks("layer")
        fixed = sum(block.nbytes for block in pack.blocks("resident"))
        pack.close()
        ring = 0 if self.share >= 1 else 3
        return fixed + (round(self.share * len(layers)) + ring) * block_memory(layers)

    def _together(self, lanes: Sequence[Lane], turn: int, inputs: Any) -> float:
        """All policies on one text; the share of the processor that other programs took meanwhile.

        The first turn warms up on another text: costs and calibration are learned in it.
        """
        count = WARM_UP if turn == 0 else self.tokens
        tokens = [min(count, 10) if lane.decoder.policy.name == "none" else count for lane in lanes]
        order = [(place + turn * (len(lanes) // 2 + 1)) % len(lanes) for place in range(len(lanes))]
        for _ in range(ATTEMPTS):
            load = OthersLoad()
            run_together(lanes, order[:: 1 if turn % 2 else -1], tokens, inputs)
            others = load.share()
            if others < CALM:
                break
        return others

    def _row(self, tree: str, runs: Sequence[SpeculationStats]) -> dict[str, Any]:
        cycles = [cycle for run in runs for cycle in run.cycles]
        made = SpeculationStats(cycles=cycles)
        passes, label = len(cycles), runs[0].label

        def mean(name: str) -> float:
            return round(sum(getattr(cycle, name) for cycle in cycles) / passes / 1e3, 2)

        return {
            "target": self.target,
            "draft": self.draft,
            "prompt": self.prompt,
            "dram_share": self.share,
            "label": label if not self.throttle else f"{label}, from the page cache",
            "tree": tree,
            "tokens": sum(run.tokens for run in runs),
            "tokens_per_s": round(made.tokens_per_s, 4),
            "acceptance_length": round(made.acceptance_length, 3),
            "passes": passes,
            "rows": round(sum(cycle.nodes for cycle in cycles) / passes, 1),
            "draft_ms": mean("draft_us"),
            "verify_ms": mean("verify_us"),
            "wait_ms": mean("wait_us"),
            "project_ms": mean("project_us"),
            "cycle_ms": mean("total_us"),
            "predicted_ms": mean("predicted_us"),
            "read_mb": round(sum(cycle.nbytes for cycle in cycles) / passes / 1e6, 1),
        }


def make_decoder(tree: str, target: FlashTarget, draft: Draft) -> LeverDecoding:
    """Only ours drafts ahead; the twins are plain."""
    policy, blind = TREES[tree](), "without union" in tree
    overlap = policy.name == "lever" and "no overlap" not in tree
    return LeverDecoding(
        None if policy.name == "none" else draft,
        policy,
        target,
        overlap=overlap,
        price_union=not blind,
    )


BLANK = {
    "target": "",
    "draft": "",
    "agreement": "",
    "prompt": "",
    "dram_share": "",
    "label": "measured",
    "tree": "",
    "tokens": "",
    "tokens_per_s": "",
    "acceptance_length": "",
    "passes": "",
    "rows": "",
    "draft_ms": "",
    "verify_ms": "",
    "wait_ms": "",
    "project_ms": "",
    "cycle_ms": "",
    "predicted_ms": "",
    "read_mb": "",
    "others_cpu": "",
}


@dataclass(frozen=True)
class ReadCell(Cell):
    """Our reader against plain large-block direct reads of the same file, in turns.

    The plain reads go to as much memory as the stream's three buffers, as every reader's must whose
    bytes are to be used; beside them, for comparison, into one 8 MiB block again and again, which
    stays in the processor's cache.
    """

    repeats: int = 12

    def run(self, lab: Lab) -> Iterator[dict[str, Any]]:
        lab.close()
        path = lab.pack("dense")
        pack = FlashPack.open(path)
        kept = 3 * block_memory(pack.blocks("layer"))
        readers: dict[str, Callable[[], float]] = {
            "reader": lambda: stream_gbps(pack, 384 << 20),
            "plain direct read": lambda: plain_gbps(path, 384 << 20, memory=kept),
            "plain direct read, one block": lambda: plain_gbps(path, 384 << 20),
        }
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(self.repeats):
            for name in list(readers)[:: 1 if turn % 2 else -1]:
                speeds[name].append(readers[name]())
                yield {
                    **BLANK,
                    "target": "dense",
                    "tree": name,
                    "value": round(speeds[name][-1], 3),
                }
        pack.close()
        # Harmonic means: all bytes over all the time.
        ours, plain, block = (statistics.harmonic_mean(found) for found in speeds.values())
        yield {**BLANK, "target": "dense", "tree": "read share", "value": round(ours / plain, 3)}
        yield {
            **BLANK,
            "target": "dense",
            "tree": "read share, one block",
            "value": round(ours / block, 3),
        }


def stream_gbps(pack: FlashPack, nbytes: int) -> float:
    """GB/s of layer blocks through three buffers, as a target's stream reads them, with nothing to
    compute.
    """
    blocks = pack.blocks("layer")
    buffers = deque(Buffer.several(3, block_memory(blocks)))
    for buffer in buffers:
        buffer.bytes.zero_()  # the kernel hands out pages on first touch
    waiting, done = deque[Any](), 0
    begin = time.perf_counter()
    for block in blocks:
        if done >= nbytes:
            break
        buffer = buffers.popleft()
        waiting.append(pack.submit(block, buffer))
        buffers.append(buffer)
        done += block.nbytes
        if len(waiting) == 3:
            waiting.popleft().result()
    while waiting:
        waiting.popleft().result()
    return done / (time.perf_counter() - begin) / 1e9


@dataclass(frozen=True)
class IdentityCell(Cell):
    """In float32, the tokens of every tree, pruned and not, against plain `generate` of the model
    in memory.
    """

    tokens: int = 20
    trees: tuple[str, ...] = ("lever", "chain 8", "specinfer", "opt_tree 16")

    def run(self, lab: Lab) -> Iterator[dict[str, Any]]:
        from hybrimoe_plugin.hosts.transformers import load_plain_model

        plain, _ = load_plain_model(None, source_path(), dtype=torch.float32, progress=False)
        target = lab.target("narrow-fp32", "300MiB")
        head = plain.get_output_embeddings().weight.detach()
        gate = ExitGate(ExitPredictor(head * 0.05, 15, 0.0, ""), PruneSettings())
        settings = {
            "max_new_tokens": self.tokens,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        for prompt in PROMPTS:
            inputs = lab.prompt(prompt)
            want = plain.generate(**inputs, **settings)
            for tree in self.trees:
                for pruned in (False, True):
                    target.set_gate(gate if pruned else None)
                    decoder = LeverDecoding(
                        lab.draft("low-bit 65 %"), TREES[tree](), target, prune="always"
                    )
                    same = torch.equal(
                        target.model.generate(**inputs, custom_generate=decoder, **settings), want
                    )
                    decoder.close()
                    name = f"{tree}{', pruned' if pruned else ''}: identical"
                    yield {
                        **BLANK,
                        "target": "narrow-fp32",
                        "prompt": prompt,
                        "tree": name,
                        "value": int(same),
                    }
        target.set_gate(None)


def _cells() -> Iterator[Cell]:
    yield ReadCell("read")
    for prompt in PROMPTS:
        yield TreeCell(f"dense, low-bit 65 %, {prompt}", prompt=prompt)
    yield IdentityCell("identity")
    for prompt in PROMPTS:
        yield TreeCell(f"moe, low-bit 65 %, {prompt}", "mixtral", prompt=prompt, trees=MOE_TREES)
    few = ("flash autoregressive", "chain 8", "specinfer", "opt_tree 16", "lever")
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        yield TreeCell(f"dram {share:.0%}", trees=few, tokens=32, rounds=2, share=share)
    # n-grams are accepted seldom here: hardly more than a token a pass.
    for draft, tokens, rounds in (("low-bit 50 %", 32, 2), ("n-gram", 12, 1)):
        for prompt in PROMPTS:
            yield TreeCell(
                f"dense, {draft}, {prompt}", "dense", draft, prompt, FEW_TREES, tokens, rounds
            )
    for throttle in ("ufs3.1", "ufs4.0", "nvme"):
        yield TreeCell(f"throttled {throttle}", trees=few, tokens=32, rounds=1, throttle=throttle)


CELLS = tuple(_cells())
QUICK_CELLS: tuple[Cell, ...] = (
    ReadCell("read", 4),
    IdentityCell("identity", 10, ("lever",)),
    TreeCell(
        "dense",
        trees=("flash autoregressive", "chain 8", "specinfer", "opt_tree 16", "lever"),
        tokens=20,
        rounds=1,
    ),
    TreeCell(
        "moe",
        "mixtral",
        trees=("flash autoregressive", "chain 4", "opt_tree 8", "lever"),
        tokens=20,
        rounds=1,
    ),
)
