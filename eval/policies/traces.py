"""The routing that every question is asked on: real traces, and generated ones.

Generated ones have the shapes of the paper's three models.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.replay.profile_files import load_profile
from hybrimoe_plugin.replay.sources import Popularity, counts, synthetic
from hybrimoe_plugin.replay.trace import Trace, read_trace

DATA = Path(__file__).resolve().parents[1] / "data"
REAL = ("qwen", "gemma", "gptoss")
FLAT = ("mixtral-8x7b", "deepseek-v2-lite", "qwen2-57b-a14b")
RECORDED = ("smollm2-mixtral", "smollm2-qwen2moe")


class Shape(NamedTuple):
    """A model of the paper, and parameters of routing that is flat in the long run.

    `drift` and `locality` were fitted so that LRU and MRS at 25 % hit as often as in the paper.
    """

    layers: int
    experts: int
    top_k: int
    drift: float
    locality: float
    popularity: str | None = None
    """File in `eval/data` with each layer's measured shares of its experts."""


SHAPES = {
    "mixtral-8x7b": Shape(32, 8, 2, 0.40, 0.0, "mixtral_popularity.json"),
    "deepseek-v2-lite": Shape(26, 64, 6, 0.58, 0.0),
    "qwen2-57b-a14b": Shape(28, 64, 8, 0.57, 0.0),
}


@cache
def real(name: str) -> Trace:
    """A trace from `eval/data`."""
    return read_trace(DATA / f"{name}.trace")


def recorded_names() -> tuple[str, ...]:
    """Recorded demo traces that are there."""
    return tuple(name for name in RECORDED if (DATA / f"{name}.trace").is_file())


@cache
def flat(name: str, prompt_tokens: int, decode_tokens: int, text: int) -> Trace:
    """Flat routing in the shape of one of the paper's models, made once and kept."""
    return make_flat(name, prompt_tokens, decode_tokens, text)


def make_flat(name: str, prompt_tokens: int, decode_tokens: int, text: int) -> Trace:
    """Flat routing in the shape of one of the paper's models.

    Mixtral's long-run popularity is the measured one.
    """
    shape = SHAPES[name]
    spec = load_profile(f"a6000-{name}").spec
    return synthetic(
        shape.layers,
        shape.experts,
        shape.top_k,
        model=f"{name}, flat",
        expert_bytes=spec.expert_bytes,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        locality=shape.locality,
        drift=shape.drift,
        popularity=None if shape.popularity is None else measured_popularity(shape.popularity),
        text=text,
    )


@cache
def measured_popularity(file: str) -> Popularity:
    """[L, E] shares of a layer's experts, over several texts, from a file in `eval/data`."""
    counted = json.loads((DATA / file).read_text(encoding="utf-8"))
    shares = []
    for name, table in counted.items():
        if "instruct" in name:
            counts_of_subject = np.array(table, dtype=np.float64)
            shares.append(counts_of_subject / counts_of_subject.sum(axis=1, keepdims=True))
    total = np.sum(shares, axis=0)
    return np.asarray(total / total.sum(axis=1, keepdims=True))


def other_text(trace: Trace, name: str, start: int = 0) -> Popularity:
    """Popularity by which systems place their first experts: never from the tokens that are judged.

    For flat routing another text of the same model. The real traces hold one text each, so it is
    the first half of their own answer, which favours the systems that never move an expert.

    Args:
        start: which other text; of a real trace, later ones are tokens drawn from that half, with
            repeats.
    """
    if name in SHAPES:
        return counts(flat(name, 64, 64, text=7 + start).calls, trace.header)
    decode = [group for group in trace.passes() if len(group[0].ids) == 1]
    half = decode[: len(decode) // 2]
    drawn = list(range(len(half)))
    if start:
        drawn = np.random.default_rng(start).integers(0, len(half), len(half)).tolist()
    calls = [call for index in drawn for call in half[index]]
    return counts(calls, trace.header)


def costs_for(profile: str, trace: Trace, name: str) -> CostModel:
    """Costs of one machine for a trace's experts.

    `a6000` and `constants` stand for the paper's machine.
    """
    if profile in ("a6000", "constants"):
        # Real traces: the shape of the paper's that is nearest in size.
        nearest = "deepseek-v2-lite" if trace.header.expert_bytes < 8e6 else "qwen2-57b-a14b"
        profile = f"{profile}-{name if name in SHAPES else nearest}"
    found = load_profile(profile)
    return found.costs(shape_of(trace, found.spec))


def shape_of(trace: Trace, like: ExpertSpec) -> ExpertSpec:
    """An expert of the trace's size.

    Times scale with bytes, so the split among its matrices does not matter.
    """
    third, rest = divmod(trace.header.expert_bytes, 3)
    header = trace.header
    return replace(
        like,
        experts=header.experts,
        top_k=header.top_k,
        gate_bytes=third,
        up_bytes=third,
        down_bytes=third + rest,
    )
