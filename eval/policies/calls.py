"""Made-up layer calls for schedulers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.core import OFFLOADED, Routed
from hybrimoe_plugin.policy.step import loads

EXPERTS, TOP_K = 256, 8
VARIANTS = 3
PREFILL_LOADS = (1, 1, 2, 3, 5, 8, 20)


class Call(NamedTuple):
    """What a scheduler is asked."""

    routed: Sequence[Routed]
    link_free_us: float


def random_call(rng: np.random.Generator, kind: str) -> Call:
    """A call of 2 to 9 experts.

    Args:
        kind: `decode`, `small prefill`, or `in flight`, which is a prefill with some experts on
            their way.
    """
    routed = []
    for expert in range(int(rng.integers(2, 10))):
        load = 1 if kind == "decode" else int(rng.choice(PREFILL_LOADS))
        ready_us = float(rng.choice([0.0, OFFLOADED, OFFLOADED]))
        if kind == "in flight" and rng.random() < 0.3:
            ready_us = float(rng.uniform(1, 1500))
        routed.append(Routed(expert, load, ready_us))
    arrivals = [item.ready_us for item in routed if item.ready_us != OFFLOADED]
    return Call(routed, max(arrivals, default=0.0))


def decode_calls(rng: np.random.Generator) -> list[list[Routed]]:
    """Calls of one token: 8 of 256 experts, about a third of them resident."""
    experts = rng.choice(EXPERTS, TOP_K, replace=False).tolist()
    calls = []
    for variant in range(VARIANTS):
        routed = []
        for place, expert in enumerate(experts):
            resident = (place + variant) % 3 == 0
            routed.append(Routed(expert, 1, 0.0 if resident else OFFLOADED))
        calls.append(routed)
    return calls


def in_flight_calls(calls: Sequence[Sequence[Routed]]) -> list[list[Routed]]:
    """The same calls, each with another of its experts 150 us from arriving."""
    found = []
    for variant, call in enumerate(calls):
        routed = list(call)
        routed[variant] = routed[variant]._replace(ready_us=150.0)
        found.append(routed)
    return found


def prefill_calls(rng: np.random.Generator) -> list[list[Routed]]:
    """Calls of many tokens: all of 256 experts, a quarter of them resident."""
    loads = rng.integers(1, 60, (VARIANTS, EXPERTS)).tolist()
    calls = []
    for row in loads:
        routed = []
        for expert, load in enumerate(row):
            resident = expert % 4 == 0
            routed.append(Routed(expert, load, 0.0 if resident else OFFLOADED))
        calls.append(routed)
    return calls


def few_row_call(
    rng: np.random.Generator,
    ids: NDArray[np.int64],
    cached: Collection[int],
    coming: int,
    transfer_us: float,
    busy_us: float = 0.0,
) -> Call:
    """A call of a few rows.

    Args:
        ids: [T, K] the experts of each row.
        cached: resident experts.
        coming: how many of the others are in flight, one transfer behind another.
        busy_us: until when the link is busy besides.
    """
    found = loads(ids)
    missing = [expert for expert in found if expert not in cached]
    arrival = float(rng.uniform(0.0, transfer_us))
    ready = {}
    for expert in rng.permutation(missing)[:coming].tolist():
        ready[expert] = arrival
        arrival += transfer_us
    routed = []
    for expert, load in found.items():
        ready_us = ready.get(expert, 0.0 if expert in cached else OFFLOADED)
        routed.append(Routed(expert, load, ready_us))
    return Call(routed, max(busy_us, *ready.values(), 0.0))


def union_call(rng: np.random.Generator, size: int, rows: int, top_k: int) -> list[Routed]:
    """So many rows that choose so many different experts, about half of them resident."""
    extra = rng.multinomial(rows * top_k - size, [1 / size] * size)
    resident = rng.random(size) < 0.5
    routed = []
    for expert, (more, there) in enumerate(zip(extra.tolist(), resident.tolist(), strict=True)):
        routed.append(Routed(expert, 1 + more, 0.0 if there else OFFLOADED))
    return routed
