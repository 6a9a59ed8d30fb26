"""Where traces come from besides recorded runs: public routing data, popularity tables and
generators.
"""

from __future__ import annotations

import csv
import json
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.errors import TraceError
from hybrimoe_plugin.files import read_regular
from hybrimoe_plugin.replay.trace import Call, Trace, TraceHeader, check_header, read_trace

Popularity = NDArray[np.float64]

MAX_TEXT_BYTES = 4 << 20
"""Of a CSV or JSON file."""


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace of any known kind: our format, or a `route_trace v1` CSV.

    Raises:
        TraceError: neither, or damaged.
    """
    if Path(path).suffix == ".csv":
        return read_route_csv(path)
    return read_trace(path)


def read_route_csv(path: str | os.PathLike[str]) -> Trace:
    """Import a `route_trace v1` CSV (Helldez/BigMoeOnEdge, Apache-2.0): chosen experts and weights,
    no scores.

    Prompt tokens become one call per layer. A layer whose prompt routing is recorded for fewer
    tokens than the others (the last one, in these files) gets a call of that many tokens.

    Raises:
        TraceError: not such a file, or a value out of range.
    """
    try:
        lines = read_regular(path, MAX_TEXT_BYTES).decode("utf-8").splitlines()
        facts = _facts(lines, path)
        return _assemble_csv(_rows(lines), facts, path)
    except (
        OSError,
        UnicodeDecodeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
    ) as error:
        raise TraceError(
            f"{path}: not a sound route_trace v1 file ({type(error).__name__}: {error})"
        ) from None


def read_popularity(path: str | os.PathLike[str]) -> Popularity:
    """[L, E] shares from a fiddler `expert_popularity` table; each row sums to 1.

    Raises:
        TraceError: not such a file.
    """
    try:
        counts = np.asarray(
            json.loads(read_regular(path, MAX_TEXT_BYTES))["expert_popularity"], dtype=np.float64
        )
        if (
            counts.ndim != 2
            or not np.isfinite(counts).all()
            or counts.min() < 0
            or (counts.sum(axis=1) <= 0).any()
        ):
            raise ValueError("counts must be a table of non-negative numbers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TraceError(f"{path}: not a popularity table ({error})") from None
    return counts / counts.sum(axis=1, keepdims=True)


def synthetic(
    layers: int,
    experts: int,
    top_k: int,
    *,
    model: str,
    expert_bytes: int,
    prompt_tokens: int = 64,
    decode_tokens: int = 128,
    skew: float = 0.0,
    locality: float = 0.0,
    drift: float = 0.0,
    correlation: float = 0.0,
    popularity: Popularity | None = None,
    seed: int = 0,
    text: int = 0,
) -> Trace:
    """Generate routing with stated statistics; every call carries full scores.

    Args:
        skew: standard deviation of the experts' fixed preference (log scale); 0 is flat.
        locality: share of a token's preference that it has from the token before (AR(1)
            coefficient), 0 to below 1.
        drift: share of the preference that changes slowly, as a text's topic does (memory of 50
            tokens), 0 to 1.
        correlation: share of a layer's preference that it has from the layer before (through a
            fixed permutation).
        popularity: [L, E] shares that replace the random skew.
        seed: fixes the model (skew and permutations).
        text: fixes the text that it reads.
    """
    rng = np.random.default_rng(seed)
    base = (
        rng.standard_normal((layers, experts)) * skew
        if popularity is None
        else np.log(popularity + 1e-9)
    )
    shuffles = np.stack([rng.permutation(experts) for _ in range(layers)])
    rng = np.random.default_rng([seed, text])
    state, topic = rng.standard_normal((2, layers, experts))
    calls: list[Call] = []
    for tokens in [prompt_tokens] * (prompt_tokens > 0) + [1] * decode_tokens:
        logits = np.empty((tokens, layers, experts))
        for token in range(tokens):
            noise = rng.standard_normal((layers, experts))
            for layer in range(1, layers):
                linked = noise[layer - 1][shuffles[layer]]
                noise[layer] = correlation * linked + (1 - correlation**2) ** 0.5 * noise[layer]
            state = locality * state + (1 - locality**2) ** 0.5 * noise
            topic = _TOPIC * topic + (1 - _TOPIC**2) ** 0.5 * rng.standard_normal((layers, experts))
            logits[token] = base + (1 - drift**2) ** 0.5 * state + drift * topic
        for layer in range(layers):
            calls.append(_routed(layer, logits[:, layer], top_k))
    source = (
        f"synthetic: skew {skew}, locality {locality}, drift {drift}, correlation "
        f"{correlation}, seed {seed}/{text}"
    )
    if popularity is not None:
        source += ", measured popularity"
    return Trace(TraceHeader(model, layers, experts, top_k, expert_bytes, source), calls)


_TOPIC = 0.98


def _routed(layer: int, logits: NDArray[np.float64], top_k: int) -> Call:
    """Softmax, top-k, renormalised weights for logits [T, E]."""
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    ids = np.argsort(-scores, axis=1)[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    return Call(layer, ids, weights.astype(np.float32), scores.astype(np.float32), ())


def counts(calls: Iterable[Call], header: TraceHeader) -> Popularity:
    """[L, E] shares of how often these calls chose each expert, smoothed by half a choice; rows sum
    to 1.
    """
    chosen = np.full((header.layers, header.experts), 0.5)
    for call in calls:
        np.add.at(chosen[call.layer], call.ids.ravel(), 1.0)
    return chosen / chosen.sum(axis=1, keepdims=True)


def with_predictions(trace: Trace, recall: float, depth: int = 3, seed: int = 0) -> Trace:
    """Model look-ahead predictions of a stated recall at distance 1; at distance d it is `recall **
    d`.

    Each true expert stays with that probability; the others are drawn from the layer's popularity,
    without repeats. The header says that they are modelled.
    """
    rng = np.random.default_rng(seed)
    popularity = np.log(counts(trace.calls, trace.header))
    calls: list[Call] = []
    for group in trace.passes():
        by_layer = {call.layer: call for call in group}
        for call in group:
            later = [by_layer.get(call.layer + distance) for distance in range(1, depth + 1)]
            predicted = []
            for distance, target in enumerate(later, 1):
                if target is None or len(target.ids) != len(call.ids):
                    break
                predicted.append(_blur(target.ids, popularity[target.layer], recall**distance, rng))
            calls.append(call._replace(predicted=tuple(predicted)))
    return Trace(replace(trace.header, predictions=f"modelled at recall {recall}"), calls)


def _blur(
    ids: NDArray[np.int64], liking: Popularity, recall: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Keep each id with probability `recall`, replace the others by other experts, popular ones
    more often.

    Drawing without repeats is taking the highest of log popularity plus Gumbel noise.
    """
    keys = liking + rng.gumbel(size=(len(ids), len(liking)))
    np.put_along_axis(keys, ids, -np.inf, axis=1)
    others = np.argsort(-keys, axis=1)[:, : ids.shape[1]]
    lost = rng.random(ids.shape) >= recall
    # Where nearly all experts are chosen there may be too few others: then the true ones stay.
    lost &= np.take_along_axis(keys, others, axis=1) > -np.inf
    return np.where(lost, others, ids)


def _facts(lines: Sequence[str], path: str | os.PathLike[str]) -> dict[str, str]:
    if not lines or not lines[0].startswith("# route_trace v1"):
        raise ValueError("the first line is not '# route_trace v1'")
    facts: dict[str, str] = {}
    for line in lines:
        if line.startswith("#"):
            for key, value in re.findall(r"(\w+)=(\S+)", line[:4096]):
                facts.setdefault(key, value)
    facts["model"] = Path(facts["model"]).name.removesuffix(".gguf")
    return facts


def _rows(lines: Sequence[str]) -> NDArray[np.float64]:
    """[N, 6]: the columns below."""
    names = ("phase", "step", "layer", "slot", "expert", "weight")
    values = array("d")  # lists of so many texts would take ten times the file
    for row in csv.DictReader(line for line in lines if line and not line.startswith("#")):
        values.extend(float(row[name]) for name in names)
    rows = np.array(values).reshape(-1, len(names))
    if not np.isfinite(rows).all():
        raise ValueError("a value is no finite number")
    return rows


def _assemble_csv(
    rows: NDArray[np.float64], facts: dict[str, str], path: str | os.PathLike[str]
) -> Trace:
    experts, top_k = int(facts["n_expert"]), int(facts["n_expert_used"])
    layers = np.unique(rows[:, 2]).astype(int)
    if rows[:, 4].min() < 0 or rows[:, 4].max() >= experts:
        raise ValueError("an expert number is out of range")
    header = TraceHeader(
        model=facts["model"],
        layers=len(layers),
        experts=experts,
        top_k=top_k,
        expert_bytes=int(facts["expert_bytes"]),
        source=f"{Path(path).name}: Helldez/BigMoeOnEdge 2d4f2b11, Apache-2.0",
    )
    check_header(header)
    position = {layer: index for index, layer in enumerate(layers.tolist())}
    calls: list[Call] = []
    for phase in (0, 1):
        part = rows[rows[:, 0] == phase]
        passes = part[:, 1] * phase  # the whole prompt is one
        order = np.lexsort((part[:, 3], part[:, 1], part[:, 2], passes))
        part, passes = part[order], passes[order]
        begins = (np.diff(passes) != 0) | (np.diff(part[:, 2]) != 0)
        for chosen in np.split(part, np.flatnonzero(begins) + 1) if len(part) else ():
            ids = chosen[:, 4].astype(np.int64).reshape(-1, top_k)
            weights = chosen[:, 5].astype(np.float32).reshape(-1, top_k)
            calls.append(Call(position[int(chosen[0, 2])], ids, weights, None, ()))
    return Trace(header, calls)
