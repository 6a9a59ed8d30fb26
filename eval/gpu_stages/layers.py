"""MoE layers alone, in the shapes of Mixtral and DeepSeek-V2-Lite, half of the experts cached: ours
and its baselines.

All run on the same weights, backends and measured costs, one after another.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from eval.cuda import LOAD_EVERY_MISS
from eval.cuda_bench import Bench, limit_cpu
from eval.gpu_stages.place import Place, Row
from eval.shapes import MODELS, Model
from eval.systems import KTRANSFORMERS, OURS, PUBLISHED

SYSTEMS = (OURS, KTRANSFORMERS, LOAD_EVERY_MISS, PUBLISHED)
RATIO = 0.5
LAYERS = 4
WARM_UP = 6
DECODE_TOKENS = 30
DRY_DECODE_TOKENS = 6
PROMPTS = 3


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    if not place.dry:
        limit_cpu()
    for model in (MODELS[1], MODELS[2]):
        bench = Bench(model, place.dry, quick=place.dry, layers=2 if place.dry else LAYERS)
        try:
            yield from _rows(place, model, bench)
        finally:
            bench.close()


def _rows(place: Place, model: Model, bench: Bench) -> Iterator[Row]:
    prompts, decode = bench.routing.prompts, bench.routing.decode
    count = DRY_DECODE_TOKENS if place.dry else DECODE_TOKENS
    for system in SYSTEMS:
        engine = bench.engine(system, RATIO)
        prefill = [bench.run(engine, prompts[turn % len(prompts)]) for turn in range(PROMPTS + 1)][
            1:
        ]
        # Each step once: a cache that had seen it before would find its experts.
        steps = [bench.run(engine, calls) for calls in decode[: WARM_UP + count]]
        counters = engine.controller.counters
        low, middle, high = (float(us) / 1e3 for us in np.percentile(steps[WARM_UP:], (20, 50, 80)))
        yield {
            "case": f"{model.name}: {system.name}",
            "layers": len(bench.layers),
            "prefill_ms_p50": float(np.median(prefill)) / 1e3,
            "decode_ms_p20": low,
            "decode_ms_p50": middle,
            "decode_ms_p80": high,
            "hit_rate": counters.hit_rate,
        }
