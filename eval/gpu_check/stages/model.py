"""How fast: ours and three baselines on the check's model, half of the experts cached."""

from __future__ import annotations

from collections.abc import Iterator

from eval.gpu_bench.baselines import LOAD_EVERY_MISS
from eval.gpu_check.place import Place, Row
from eval.gpu_check.timing import measured
from eval.policies.systems import KTRANSFORMERS, OURS, PUBLISHED


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    for system in (OURS, KTRANSFORMERS, LOAD_EVERY_MISS, PUBLISHED):
        yield measured(place, system, 0.5)
