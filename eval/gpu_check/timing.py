"""One system on the check's model, measured: shared by several stages."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from eval.cuda_model.subject import Subject, measure
from eval.gpu_check.check_model import PROMPT_TOKENS, given, model_file
from eval.gpu_check.place import Place, Row
from eval.models.routing import Routing
from eval.policies.systems import System
from eval.reporting.quantiles import percentiles

More = Callable[[Subject, Routing], Row]


def measured(
    place: Place,
    system: System,
    ratio: float,
    prompt_tokens: int = PROMPT_TOKENS,
    more: More | None = None,
) -> Row:
    """A row for one system at one cache size: prefill and decode times, hit rate.

    Args:
        more: gives further columns, from the loaded model once its times are taken.
    """
    started = time.perf_counter()
    routing = given(place, prompt_tokens)
    subject = Subject(model_file(place), system, ratio, routing, place.dry)
    loaded = time.perf_counter() - started
    try:
        timing = measure(subject, routing)
        layers = subject.model.config.num_hidden_layers
        others = more(subject, routing) if more is not None else {}
    finally:
        subject.close()
    low, middle, high = percentiles(timing.decode_us)
    length = len(routing.prompts[0][0].ids)
    return {
        "case": f"{system.name}, {ratio:.0%} of the experts cached, {length} prompt tokens",
        "system": system.name,
        "cache": ratio,
        "layers": layers,
        "prompt_tokens": length,
        "prefill_ms_p50": statistics.median(timing.prefill_us) / 1e3,
        "decode_ms_p20": low / 1e3,
        "decode_ms_p50": middle / 1e3,
        "decode_ms_p80": high / 1e3,
        "hit_rate": timing.hit_rate,
        "first_hit_rate": timing.first_hit_rate,
        "layers_captured": timing.captured,
        "load_s": loaded,
        **others,
    }
