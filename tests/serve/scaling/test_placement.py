"""How machines are shared out among replicas."""

from __future__ import annotations

from typing import Any

import pytest

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.serve.scaling.placement import Machine, Placement, Scale, place

CPU = Machine(16, 0)
GPUS = Machine(64, 4)


@pytest.mark.parametrize(
    ("scale", "machines", "expected"),
    [
        (Scale(), [CPU], Placement(1, 1, 16, 0)),
        (Scale(), [CPU, CPU], Placement(2, 2, 16, 0)),
        (Scale(replicas=2), [CPU], Placement(2, 2, 8, 0)),
        (Scale(replicas=3), [CPU], Placement(3, 3, 5, 0)),
        (Scale(replicas=3), [CPU, Machine(10, 0)], Placement(3, 3, 5, 0)),
        (Scale(replicas=1, max_replicas=4), [CPU], Placement(1, 4, 4, 0)),
        (Scale(), [GPUS], Placement(4, 4, 16, 1)),
        (Scale(replicas=2), [GPUS], Placement(2, 2, 16, 1)),
        (Scale(), [GPUS, Machine(8, 1), CPU], Placement(5, 5, 8, 1)),
        (Scale(replicas=2, max_replicas=9), [GPUS], Placement(2, 9, 16, 1)),
        (Scale(), [CPU, Machine(0, 0)], Placement(1, 1, 16, 0)),
    ],
)
def test_machines_are_shared_out(
    scale: Scale, machines: list[Machine], expected: Placement
) -> None:
    assert place(scale, machines) == expected


@pytest.mark.parametrize(
    ("scale", "machines", "told"),
    [
        (Scale(), [], "no machine"),
        (Scale(replicas=5), [GPUS], "has 4"),
        (Scale(replicas=17), [CPU], "less than a core"),
        (Scale(), [Machine(2, 4)], "less than a core"),
    ],
)
def test_what_does_not_fit_is_refused(scale: Scale, machines: list[Machine], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        place(scale, machines)


@pytest.mark.parametrize(
    "values",
    [
        *({"replicas": 0}, {"max_replicas": 0}, {"requests": 0}, {"queue": 0}, {"ingresses": 0}),
        *({"target": float("nan")}, {"target": -1.0}, {"drain_s": 0.0}),
        {"replicas": 3, "max_replicas": 2},
    ],
)
def test_impossible_scales_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Scale(**values)
