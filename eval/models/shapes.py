"""Synthetic models in the shapes of real ones: size of their experts, whose routing they use."""

from __future__ import annotations

from typing import NamedTuple

from eval.models.blocks import stored_bytes

Kinds = tuple[str, str, str]
"""GGML types of gate, up and down."""

Q4_K: Kinds = ("Q4_K", "Q4_K", "Q4_K")
Q4_K_M: Kinds = ("Q4_K", "Q4_K", "Q6_K")


class Model(NamedTuple):
    """Experts of one model as its usual GGUF file has them."""

    name: str
    """A key of `eval.models.synthetic.SHAPES`, in capitals; after a comma, whose routing it is."""
    trace: str
    """Name of a record in `eval/data`, or of a generator in `eval.policies.traces`."""
    hidden: int
    intermediate: int
    note: str = ""
    like: str = ""
    """Key of `eval.policies.traces.SHAPES`: the model whose experts' size a record stands for, if
    it was recorded on a model of smaller ones.
    """
    kinds: Kinds = Q4_K
    kinds_too: Kinds = Q4_K_M
    """Of every second layer: Q4_K_M files keep half of the down matrices in Q6_K."""

    @property
    def shape(self) -> str:
        """Key of `eval.models.synthetic.SHAPES`."""
        return self.name.partition(",")[0].lower()


MODELS = (
    Model(
        "Qwen3-30B-A3B",
        "qwen",
        hidden=2048,
        intermediate=768,
        note="its own run, recorded; top 6 as recorded",
    ),
    Model(
        "DeepSeek-V2-Lite",
        "smollm2-64x6",
        hidden=2048,
        intermediate=1536,
        note="recorded on a demo model with as many experts; intermediate 1408 padded to 1536: K "
        "blocks and kt-kernel want multiples of 256",
        like="deepseek-v2-lite",
    ),
    Model(
        "Mixtral-8x7B",
        "smollm2-mixtral",
        hidden=4096,
        intermediate=14336,
        note="recorded on the demo model in Mixtral form",
        like="mixtral-8x7b",
    ),
    Model(
        "Qwen3-30B-A3B, routed as Gemma-4",
        "gemma",
        hidden=2048,
        intermediate=768,
        note="the other recorded run of a large model with 128 experts and top 6",
    ),
    Model(
        "Mixtral-8x7B, flat routing",
        "mixtral-8x7b",
        hidden=4096,
        intermediate=14336,
        note="generated, long-run popularity as measured",
    ),
)


def layer_bytes(model: Model, experts: int) -> float:
    """Bytes of a layer, on average over both kinds."""
    values = model.hidden * model.intermediate
    total = 0
    for kind in (*model.kinds, *model.kinds_too):
        total += stored_bytes(kind, values)
    return experts * total / 2


def fits(model: Model, experts: int, wanted: int, free_bytes: float) -> int:
    """Number of layers that fit the host's memory, at least 1 and at most `wanted`."""
    count = int(free_bytes // layer_bytes(model, experts))
    return max(1, min(wanted, count))
