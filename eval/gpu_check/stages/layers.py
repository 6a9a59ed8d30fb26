"""MoE layers alone, half of the experts cached: ours and its baselines.

Shapes are those of Mixtral and DeepSeek-V2-Lite. All run on the same weights, backends and measured
costs, one after another.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from eval.gpu_bench.baselines import LOAD_EVERY_MISS
from eval.gpu_bench.bench import Bench, limit_cpu
from eval.gpu_check.place import Place, Row
from eval.models.shapes import MODELS, Model
from eval.policies.systems import KTRANSFORMERS, OURS, PUBLISHED
from eval.reporting.quantiles import percentiles

SYSTEMS = (OURS, KTRANSFORMERS, LOAD_EVERY_MISS, PUBLISHED)
RATIO = 0.5
LAYERS = 4
DRY_LAYERS = 2
WARM_UP = 6
DECODE_TOKENS = 30
DRY_DECODE_TOKENS = 6
PROMPTS = 3


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    if not place.dry:
        limit_cpu()
    for model in (MODELS[1], MODELS[2]):
        count = DRY_LAYERS if place.dry else LAYERS
        bench = Bench(model, place.dry, quick=place.dry, layers=count)
        try:
            yield from _rows(place, model, bench)
        finally:
            bench.close()


def _rows(place: Place, model: Model, bench: Bench) -> Iterator[Row]:
    prompts = bench.routing.prompts
    count = DRY_DECODE_TOKENS if place.dry else DECODE_TOKENS
    decode = bench.routing.decode[: WARM_UP + count]
    turns = [prompts[turn % len(prompts)] for turn in range(PROMPTS + 1)]
    for system in SYSTEMS:
        engine = bench.engine(system, RATIO)
        prefill = [bench.run(engine, calls) for calls in turns]
        # Each step once: a cache that had seen it before would find its experts.
        steps = [bench.run(engine, calls) for calls in decode]
        counters = engine.controller.counters
        low, middle, high = percentiles(steps[WARM_UP:])
        yield {
            "case": f"{model.name}: {system.name}",
            "layers": len(bench.layers),
            "prefill_ms_p50": statistics.median(prefill[1:]) / 1e3,
            "decode_ms_p20": low / 1e3,
            "decode_ms_p50": middle / 1e3,
            "decode_ms_p80": high / 1e3,
            "hit_rate": counters.hit_rate,
        }
