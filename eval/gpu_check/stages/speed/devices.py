"""A model on two cards: the same tokens as on one, and what a hop between them costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from eval.gpu_check.place import Place, Row
from eval.gpu_check.tiny_model import FUSED, compared, greedy, load
from eval.models import tiny

STEPS = 40
WARM_UP = 8
PACKAGED = "multi-gpu/Qwen3-MoE-2-gpus.yaml"
FIRST_LAYERS = r"(\\d|[12]\\d|3[01])"
"""The layers of the first card in the packaged rules."""


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    cards = torch.cuda.device_count()
    if cards < 2:
        yield {
            "case": "two devices",
            "ok": None,
            "missing": f"a second GPU: there {'is' if cards == 1 else 'are'} {cards}",
        }
        return
    path = place.scratch / f"tiny-{FUSED}.gguf"
    tiny.write_quantised(path, FUSED)
    rules = place.scratch / "two-devices.yaml"
    rules.write_text(two_card_rules(), encoding="utf-8")
    one = greedy(place, FUSED, path, "float32")
    two = greedy(place, FUSED, path, "float32", rules=rules)
    yield compared("greedy tokens on two cards and on one", two, one, judged=True)
    alone, split = (_step_us(place, path, **more) for more in ({}, {"rules": rules}))
    yield {
        "case": "a decode step of two layers, one on each card",
        "one_card_us": alone,
        "two_cards_us": split,
        "more_us": split - alone,
    }


def two_card_rules() -> str:
    """The packaged rules for two cards, with layer 0 alone on the first one."""
    text = (files("optimize_rules") / PACKAGED).read_text(encoding="utf-8")
    assert FIRST_LAYERS in text, f"{PACKAGED} has other layers on the first card"
    lines = text.replace(FIRST_LAYERS, "0").splitlines()
    return "\n".join(line for line in lines if "cache_bytes" not in line) + "\n"


@torch.no_grad()
def _step_us(place: Place, path: Path, **settings: Any) -> float:
    """Median wall time of a greedy token."""
    model = load(place, FUSED, path, "float32", **settings)
    times: list[float] = []

    def note(*_: object) -> None:
        times.append(time.perf_counter_ns() / 1e3)

    hook = model.register_forward_hook(note)
    try:
        ids = tiny.tokens(8).to(model.device)
        model.generate(ids, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    finally:
        hook.remove()
        model.hybrimoe.restore()
    spent = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return statistics.median(spent[WARM_UP:])
