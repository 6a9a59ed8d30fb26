"""Random traffic through the slots, once free-running and once synchronised after each step.

The arithmetic of both is the same, in the same order, so every result must be the same to the last
bit; one that is not shows a missing edge between queues.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch

from eval.gpu_check.place import Place, Row
from eval.models.layers import layers_of
from eval.models.shapes import MODELS, Model
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.engine.waves import wave_calls
from hybrimoe_plugin.replay.trace import TraceHeader
from hybrimoe_plugin.weights.layer_weights import LayerWeights

SLOTS = 12
STEPS = 500
DRY_STEPS = 60


class Case(NamedTuple):
    """One shape's traffic."""

    model: Model
    experts: int
    top_k: int


# Small experts, where launches are most of the time, and large ones, where transfers overtake one
# another for long.
CASES = (Case(MODELS[0], 24, 8), Case(MODELS[2], 8, 2))


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    steps = DRY_STEPS if place.dry else STEPS
    for case in CASES:
        header = TraceHeader(case.model.name, 1, case.experts, case.top_k, 0, "random")
        # The second kind of layer: its down matrices are split into planes.
        _, layer = layers_of(case.model, header, 2, place.dry)
        free = traffic(place, layer, steps, synchronised=False)
        awaited = traffic(place, layer, steps, synchronised=True)
        pairs = zip(free, awaited, strict=True)
        different = sum(not torch.equal(one, other) for one, other in pairs)
        finite = all(bool(torch.isfinite(result).all()) for result in free)
        yield {
            "case": f"{case.model.name}: {steps} steps over {SLOTS} slots",
            "ok": different == 0 and finite,
            "calls": len(free),
            "different": different,
        }


def traffic(
    place: Place,
    layer: LayerWeights,
    steps: int,
    synchronised: bool,
) -> list[torch.Tensor]:
    """The results of all calls of one random sequence, the same in every run.

    Args:
        synchronised: wait for everything after each step.
    """
    made = make_accelerator(place.accelerator, place.device)
    assert made is not None
    made.allocate(SLOTS, [layer])
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    held: dict[int, int] = {}
    results = []
    try:
        for _ in range(steps):
            _move(made, layer, held, draw)
            if held and draw.random() < 0.5:
                results.append(_call(made, layer, held, draw, generator))
            if synchronised:
                made.synchronize()
        made.synchronize()
        return [result.cpu() for result in results]
    finally:
        made.close()


def _move(
    accelerator: SlotAccelerator,
    layer: LayerWeights,
    held: dict[int, int],
    draw: random.Random,
) -> None:
    """Send a random expert into a random slot, sometimes ahead of need, and sometimes cancel it.

    Args:
        held: slot -> the expert that it holds.

    Mutates: `held`.
    """
    slot = draw.randrange(SLOTS)
    expert = draw.randrange(layer.spec.experts)
    for other, kept in list(held.items()):
        if other == slot or kept == expert:
            del held[other]
    ahead = draw.random() < 0.5
    accelerator.onload(slot, layer, expert, ahead=ahead)
    if draw.random() < 0.2:
        # Whether the cancel comes in time depends on the timing, and both runs must go on alike:
        # the slot is not used either way.
        accelerator.cancel(slot)
        return
    held[slot] = expert


def _call(
    accelerator: SlotAccelerator,
    layer: LayerWeights,
    held: dict[int, int],
    draw: random.Random,
    generator: torch.Generator,
) -> torch.Tensor:
    """One layer call of a few tokens on some of the held experts.

    Args:
        held: slot -> the expert that it holds.
        draw: decides how many tokens and which experts.
        generator: draws states, places and routing weights.
    """
    top_k = layer.spec.top_k
    tokens = draw.choice((1, 1, 1, 3, 20))
    count = min(len(held), draw.randint(1, 2 * top_k))
    chosen = draw.sample(sorted(held), count)
    places = torch.randint(len(chosen), (tokens, top_k), generator=generator)
    experts = torch.tensor([held[slot] for slot in chosen])
    ids = experts[places]
    on_cpu = accelerator.device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    hidden = torch.randn(tokens, layer.spec.hidden, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    routed = set(ids.flatten().tolist())
    wave = {held[slot]: slot for slot in sorted(chosen) if held[slot] in routed}
    # `place` does not stop the host, so the queues run as far apart as they do in a model.
    place = accelerator.copy_to_device
    calls = wave_calls(accelerator, layer, [wave], ids.numpy(), place(hidden), place(weights))
    calls.compute(0)
    return calls.output()
