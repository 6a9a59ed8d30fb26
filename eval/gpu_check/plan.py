"""Which stages there are, in which order, and how long each may take.

Imports no torch: the parent process must start at once, and hold no part of the card.
"""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """One stage: a module with `run(place)`, which yields rows."""

    name: str
    limit_s: float
    """On a card; the process is killed then."""
    what: str
    """One line for the table and `--help`."""
    core: bool = False
    """Whether it belongs to the first four minutes."""
    quiet: bool = False
    """Whether it takes times, and so waits until the work in the background is over."""
    background: bool = False
    """Whether it runs beside the stages behind it."""
    judges: bool = False
    """Whether nothing can be called right without it."""
    model: bool = False
    """Whether it needs the synthetic model's file."""
    on_demand: bool = False
    """Whether a run on a card leaves it out unless it is named: what it compares with has to be
    brought along.
    """
    module: str = ""
    """Import path; empty for a module of `eval.gpu_check.stages` with the stage's name."""

    @property
    def path(self) -> str:
        """Import path of the stage's module."""
        return self.module or f"{__package__}.stages.{self.name}"


PREPARE = "prepare"
SPEED = f"{__package__}.stages.speed"

# Ordered by value, so that a run that is cut off loses the least.
STAGES = (
    Stage("facts", 15, "versions, memory, disk, kernel packages, page registration", core=True),
    Stage(
        PREPARE,
        90,
        "writes the synthetic model's file, beside the next stages",
        core=True,
        background=True,
    ),
    Stage("kernels", 60, "every type and shape against float64", core=True, judges=True),
    Stage(
        "slots",
        30,
        "random transfers and calls, asynchronous against synchronised",
        core=True,
        judges=True,
    ),
    Stage(
        "bandwidth",
        35,
        "links, decode kernels, onloads, demand loads behind prefetches",
        core=True,
        quiet=True,
    ),
    Stage(
        "model",
        95,
        "the Qwen3-shaped model, half of its experts cached: four systems",
        core=True,
        quiet=True,
        model=True,
    ),
    Stage(
        "path",
        50,
        "a decoder layer all in: with the host ahead, and waiting in every layer",
        quiet=True,
        model=True,
        module=f"{SPEED}.path",
    ),
    Stage(
        "int8",
        35,
        "decode kernels of every type: int8 activations proven, share of the memory's speed",
        quiet=True,
        module=f"{SPEED}.int8",
    ),
    Stage(
        "prefill",
        20,
        "prompts against the card's matrix products",
        quiet=True,
        module=f"{SPEED}.prefill",
    ),
    Stage("systems", 55, "the same model: no graphs, long prompts", quiet=True, model=True),
    Stage(
        "graphs",
        65,
        "every family: graphed tokens and the plain model's logits; attention backends",
        judges=True,
    ),
    Stage(
        "layers", 50, "Mixtral and DeepSeek layers at half the experts: four systems", quiet=True
    ),
    Stage(
        "attention",
        20,
        "decode attention with split keys against torch's, up to 32,768 tokens",
        quiet=True,
    ),
    Stage("where", 25, "where a decode step's time goes", quiet=True, model=True),
    Stage(
        "devices",
        15,
        "two cards: the same tokens as on one, and the hop between them",
        module=f"{SPEED}.devices",
    ),
    Stage(
        "flashinfer",
        60,
        "flashinfer's decode attention against torch's",
        quiet=True,
        on_demand=True,
    ),
    Stage(
        "peers",
        240,
        "llama.cpp and FreeToken on the same file and bytes of experts",
        quiet=True,
        model=True,
        on_demand=True,
    ),
    Stage(
        "classic", 240, "kTransformers 0.2.1 with our rules and its own", quiet=True, on_demand=True
    ),
)

TOTAL_S = 570.0
"""All stages that are not on demand, on a card."""
CORE_S = 240.0
DRY_LIMIT_S = 60.0
"""Of any stage without a card, where sizes are tiny."""
