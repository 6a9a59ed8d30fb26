"""Synthetic models with the shapes and the routing of real ones: random weights of the right size,
no attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from eval import traces
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.replay.profile_files import load_profile
from hybrimoe_plugin.replay.sources import Popularity, counts, with_predictions
from hybrimoe_plugin.replay.trace import Call, Trace, TraceHeader
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix

Kinds = tuple[str, str, str]

SCALES = {"Q4_K": ((0, 300.0), (2, 300.0)), "Q6_K": ((208, 1400.0),), "Q8_0": ((0, 74.0),)}
"""Type -> (byte of a float16 scale in its block, largest weight over that scale)."""


class Model(NamedTuple):
    """Experts of one model as its usual GGUF file has them."""

    name: str
    """A name in `eval.synthetic`, in capitals; what comes after a comma says whose routing it is.
    """
    trace: str
    """Name of a record in `eval/data`, or of a generator in `eval.traces`."""
    hidden: int
    intermediate: int
    kinds: Kinds
    kinds_too: Kinds
    """Of every second layer: Q4_K_M files keep half of the down matrices in Q6_K."""
    note: str = ""
    like: str = ""
    """Name in `eval.traces.SHAPES` of the model whose experts' size a record of smaller ones stands
    for.
    """

    @property
    def shape(self) -> str:
        """Name in `eval.synthetic`."""
        return self.name.partition(",")[0].lower()


MODELS = (
    Model(
        "Qwen3-30B-A3B", "qwen", 2048, 768, ("Q4_K",) * 3, ("Q4_K", "Q4_K", "Q6_K"),
        "its own run, recorded; top 6 as recorded",
    ),
    Model(
        "DeepSeek-V2-Lite", "smollm2-64x6", 2048, 1536, ("Q4_K",) * 3, ("Q4_K", "Q4_K", "Q6_K"),
        "recorded on a demo model with as many experts; intermediate 1408 padded to 1536: K "
        "blocks and kt-kernel want "
        "multiples of 256", "deepseek-v2-lite",
    ),
    Model(
        "Mixtral-8x7B", "smollm2-mixtral", 4096, 14336, ("Q4_K",) * 3, ("Q4_K", "Q4_K", "Q6_K"),
        "recorded on the demo model in Mixtral form", "mixtral-8x7b",
    ),
    Model(
        "Qwen3-30B-A3B, routed as "
        "Gemma-4", "gemma", 2048, 768, ("Q4_K",) * 3, ("Q4_K", "Q4_K", "Q6_K"),
        "the other recorded run of a large model with 128 experts and top 6",
    ),
    Model(
        "Mixtral-8x7B, flat "
        "routing", "mixtral-8x7b", 4096, 14336, ("Q4_K",) * 3, ("Q4_K", "Q4_K", "Q6_K"),
        "generated, long-run popularity as measured",
    ),
)  # fmt: skip

TINY = 64, 64, ("Q8_0", "Q8_0", "Q8_0")
"""Hidden size, intermediate size and types of a dry run: routing and plans are the model's,
arithmetic is small.
"""


PROMPTS = 4
"""Different prompts in turn: one alone, again and again, would find its own experts in every cache
that learns.
"""


class Routing(NamedTuple):
    """Prompts and the tokens after the first one, all layers with the same tokens."""

    prompts: list[list[Call]]
    decode: list[list[Call]]
    header: TraceHeader
    popularity: Popularity
    """[L, E] of tokens that are not in `decode`, by which every system places its first experts."""


def routing(
    model: Model, prompt_tokens: int, decode_tokens: int, look_ahead: int, recall: float
) -> Routing:
    """The model's routing with predictions for `look_ahead` layers: recorded ones where there are
    any, else modelled.

    A recorded prompt that is too short is continued with the recorded answer, whose tokens then
    come again in decode; further prompts are later windows of the same record.
    """
    variants = []
    for number in range(PROMPTS):
        if model.trace in traces.SHAPES:
            trace = traces.flat(model.trace, prompt_tokens, decode_tokens, text=number)
        else:
            trace = _recorded(
                traces.real(model.trace), prompt_tokens, decode_tokens, number, look_ahead
            )
        if look_ahead and trace.header.predictions == "none":
            trace = with_predictions(trace, recall, look_ahead, seed=number)
        variants.append(trace)
    passes = [list(trace.passes()) for trace in variants]
    header = variants[0].header
    if model.like:
        header = replace(header, expert_bytes=load_profile(f"a6000-{model.like}").spec.expert_bytes)
    return Routing(
        [groups[0] for groups in passes],
        passes[0][1:],
        header,
        _elsewhere(model, decode_tokens, header),
    )


def published_costs(model: Model) -> CostModel:
    """Costs of the model's experts on the paper's machine."""
    name = model.like or model.trace
    trace = traces.flat(name, 16, 4, 0) if name in traces.SHAPES else traces.real(name)
    return traces.costs_for("a6000", trace, name)


def _elsewhere(model: Model, decode_tokens: int, header: TraceHeader) -> Popularity:
    """Popularity in the rest of a recorded answer, or in another generated text."""
    if model.trace in traces.SHAPES:
        return traces.other_text(traces.flat(model.trace, 16, 4, 0), model.trace)
    answer = [group for group in traces.real(model.trace).passes() if len(group[0].ids) == 1]
    return counts(
        (call for group in answer[decode_tokens:] for call in group if call.layer < header.layers),
        header,
    )


def layers_of(model: Model, header: TraceHeader, count: int, tiny: bool) -> list[LayerWeights]:
    """`count` layers; each has bytes of its own, so that caches see as many as in the model."""
    experts, top_k = header.experts, header.top_k
    hidden, intermediate, tiny_kinds = TINY if tiny else (model.hidden, model.intermediate, None)
    made: dict[Kinds, LayerWeights] = {}
    layers = []
    for index in range(count):
        kinds = tiny_kinds or (model.kinds, model.kinds_too)[index % 2]
        if kinds not in made:
            made[kinds] = _layer(kinds, hidden, intermediate, experts, top_k)
        layers.append(_copy(made[kinds], index))
    return layers


def layer_bytes(model: Model, experts: int) -> float:
    """Bytes of a layer, on average over both kinds."""
    sizes = [
        sum(_size(kind, model.hidden * model.intermediate) for kind in kinds)
        for kinds in (model.kinds, model.kinds_too)
    ]
    return experts * sum(sizes) / len(sizes)


def _recorded(
    trace: Trace, prompt_tokens: int, decode_tokens: int, window: int, look_ahead: int
) -> Trace:
    """Prompt and answer of a recorded run, without the layer that lacks most of the prompt, and
    without scores.
    """
    groups = list(trace.passes())
    prompt, answer = groups[0], [group for group in groups[1:] if len(group[0].ids) == 1]
    whole = [call.layer for call in prompt if len(call.ids) == len(prompt[0].ids)]
    calls = []
    for layer in whole:
        rows = [call for group in (prompt, *answer) for call in group if call.layer == layer]
        ids, weights = (
            np.concatenate([c.ids for c in rows]),
            np.concatenate([c.weights for c in rows]),
        )
        first = window * max(0, len(ids) - prompt_tokens) // (PROMPTS - 1)
        part = slice(first, first + prompt_tokens)
        ahead = (
            np.concatenate(parts)[part]
            for parts in zip(*(c.predicted[:look_ahead] for c in rows), strict=True)
        )
        calls.append(Call(layer, ids[part], weights[part], None, tuple(ahead)))
    for group in answer[:decode_tokens]:
        calls += [
            call._replace(scores=None, predicted=call.predicted[:look_ahead])
            for call in group
            if call.layer in whole
        ]
    return Trace(replace(trace.header, layers=len(whole)), calls)


def _layer(kinds: Kinds, hidden: int, intermediate: int, experts: int, top_k: int) -> LayerWeights:
    rng = np.random.default_rng(0)
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    gate, up, down = (
        Matrix(kind, tuple(stored.reshape(experts, -1)), stored)
        for kind, (rows, columns) in zip(kinds, shapes, strict=True)
        for stored in [_random(rng, kind, experts * rows * columns, columns)]
    )
    sizes = [part.experts[0].size for part in (gate, up, down)]
    return LayerWeights(
        0, ExpertSpec(hidden, intermediate, experts, top_k, *kinds, *sizes), gate, up, down
    )


def _copy(like: LayerWeights, index: int) -> LayerWeights:
    parts: list[Matrix] = []
    for part in like.matrices():
        assert part.stacked is not None
        stored = part.stacked.copy()
        parts.append(Matrix(part.type_name, tuple(stored.reshape(len(part.experts), -1)), stored))
    return LayerWeights(index, like.spec, *parts)


def _random(rng: np.random.Generator, kind: str, values: int, columns: int) -> NDArray[np.uint8]:
    """Random blocks with sound scales: weights of the order 1 / sqrt(columns)."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    # One random MiB over and over: what is in the codes changes no time.
    blocks = np.resize(
        rng.integers(0, 256, 1 << 20, dtype=np.uint8), values // block * size
    ).reshape(-1, size)
    for at, largest in SCALES[kind]:
        blocks[:, at : at + 2] = np.array([columns**-0.5 / largest], np.float16).view(np.uint8)
    return blocks.ravel()


def _size(kind: str, values: int) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return values // block * size


def fits(model: Model, experts: int, wanted: int, free_bytes: float) -> int:
    """Layers that fit the host's memory, at least 1."""
    return max(1, min(wanted, int(free_bytes // layer_bytes(model, experts))))
