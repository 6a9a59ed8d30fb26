"""Changes of JSON values: profiles, the parts of a pack's index, the header of a trace."""

from __future__ import annotations

import math
import random
from typing import Any

_VALUES = (
    *(
        0,
        1,
        -1,
        2,
        0.5,
        1e-300,
        1e12,
        1e308,
        math.nan,
        math.inf,
        -math.inf,
        2**31,
        2**53,
        2**63,
        10**400,
    ),
    *(
        None,
        True,
        False,
        "",
        "x",
        "1",
        "\ud800",
        "../x",
        "a" * 100_000,
        [],
        {},
        [1],
        {"a": 1},
        [[[[]]]],
        [0] * 10_000,
    ),
)


def changed(rng: random.Random, value: Any) -> Any:
    """A copy with one part, chosen at random, replaced, left out or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        made, key = dict(value), rng.choice(list(value))
        if rng.random() < 0.08:
            del made[key]
        elif rng.random() < 0.08:
            made[rng.choice(("x", "", "__class__", key + " "))] = value[key]
        else:
            made[key] = changed(rng, value[key])
        return made
    if isinstance(value, list) and value and rng.random() < 0.9:
        items, place = list(value), rng.randrange(len(value))
        action = rng.randrange(8)
        if action == 0:
            del items[place]
        elif action == 1:
            items.insert(place, rng.choice(items))
        else:
            items[place] = changed(rng, items[place])
        return items
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, value * 2, -value, value + 4096, value * 10**9))
    return rng.choice(_VALUES)


def hurt(rng: random.Random, raw: bytes) -> bytes:
    """Bytes cut off, or a few of them changed."""
    if rng.random() < 0.3:
        return raw[: rng.randrange(len(raw))]
    made = bytearray(raw)
    for _ in range(rng.choice((1, 1, 4, 30))):
        made[rng.randrange(len(made))] = rng.choice((0, 255, 34, 91, 123, rng.randrange(256)))
    return bytes(made)
