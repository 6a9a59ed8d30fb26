"""One system on the check's model, measured: what the stages `model` and `systems` share."""

from __future__ import annotations

import time

import numpy as np

from eval import cuda_model
from eval.gpu_stages.model_file import PROMPT_TOKENS, given, model_file
from eval.gpu_stages.place import Place, Row
from eval.systems import System


def measured(place: Place, system: System, ratio: float, prompt_tokens: int = PROMPT_TOKENS) -> Row:
    """A row for one system at one cache size: time to first token, time between tokens,
    hit rate.
    """
    started = time.perf_counter()
    routing = given(place, prompt_tokens)
    subject = cuda_model.Subject(model_file(place), system, ratio, routing, place.dry)
    loaded = time.perf_counter() - started
    try:
        timing = cuda_model.measure(subject, routing)
        layers = subject.model.config.num_hidden_layers
    finally:
        subject.close()
    low, middle, high = (float(us) / 1e3 for us in np.percentile(timing.decode_us, (20, 50, 80)))
    prefill = float(np.median(timing.prefill_us)) / 1e3
    length = len(routing.prompts[0][0].ids)
    return {
        "case": f"{system.name}, {ratio:.0%} of the experts cached, {length} prompt tokens",
        "system": system.name,
        "cache": ratio,
        "layers": layers,
        "prompt_tokens": length,
        "prefill_ms_p50": prefill,
        "decode_ms_p20": low,
        "decode_ms_p50": middle,
        "decode_ms_p80": high,
        "hit_rate": timing.hit_rate,
        "layers_captured": timing.captured,
        "load_s": loaded,
    }
