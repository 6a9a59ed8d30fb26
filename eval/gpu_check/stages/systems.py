"""More of the check's model: no graphs, longer prompts."""

from __future__ import annotations

from collections.abc import Iterator

from eval.gpu_bench.baselines import NO_GRAPHS
from eval.gpu_check.place import Place, Row
from eval.gpu_check.timing import measured
from eval.policies.systems import KTRANSFORMERS, OURS


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    yield measured(place, NO_GRAPHS, 0.5)
    yield measured(place, OURS, 0.5, prompt_tokens=512)
    yield measured(place, KTRANSFORMERS, 0.5, prompt_tokens=512)
