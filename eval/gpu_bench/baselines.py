"""What the questions about GPUs have in common: systems, cache sizes, phases and the journal."""

from __future__ import annotations

from eval.policies.systems import KTRANSFORMERS, OURS, PUBLISHED, System

LOAD_EVERY_MISS = System(
    "load every miss, LRU",
    {"scheduler": "accelerator_only", "cache": "lru", "budget": "layer", "prefetch": "off"},
)
SYSTEMS = (KTRANSFORMERS, LOAD_EVERY_MISS, PUBLISHED, OURS)
NO_GRAPHS = System("ours, no graphs", {"graphs": "off"})
PLAIN = System("ours, plain dense operators", {"dense": "plain"})
RATIOS = (0.25, 0.5, 0.75)
"""Shares of the experts that are cached."""
PHASES = ("prefill", "decode")
JOURNAL = "cuda.jsonl"
"""File in `--out` that holds the finished rows of all questions about GPUs."""
NOT_JUDGED = (
    "a quick run does not judge: in a few steps of a few layers one expert's time moves a median. "
    "Comparisons in its last line are null, its times are in the table"
)
