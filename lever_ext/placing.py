"""Decides which parts of a target an accelerator computes, and sets them up there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrimoe_plugin.device.memory import human
from hybrimoe_plugin.engine.sizing import kv_cache_bytes
from lever_ext.flash.accelerator import Accelerator
from lever_ext.flash.budget import Residency, plan_residency
from lever_ext.flash.pack import FlashPack, block_memory
from lever_ext.flash.split import LayerCosts, Place, Rings, Split, best_of, choose_places, pass_us
from lever_ext.flash.split_stream import SplitStream
from lever_ext.flash.stream import LayerStream
from lever_ext.measure import ROWS, Measured, measure
from lever_ext.operators.carry import Carrier
from lever_ext.operators.decoder import FlashDecoderLayer
from lever_ext.operators.head import DeviceHead

logger = logging.getLogger(__name__)

DEVICE_RING = 3
"""Accelerator buffers for copied layers: one is computed, one is complete, one arrives."""
CONTEXT = 4096
"""Tokens whose keys and values are left room for."""
HEAD_ROWS = 4
"""Projections in a pass: one for each accepted token."""


@dataclass(frozen=True)
class Placement:
    """Where a target's layers compute, and the DRAM that they take."""

    residency: Residency
    split: Split | None
    """None where everything computes on the CPU."""

    def experts_on(self, accelerator: Accelerator | None) -> Any:
        """The device that computes routed experts; None for the CPU."""
        return accelerator.device if accelerator and self.split and self.split.experts else None

    def keeps_router(self, layer: int) -> bool:
        """Whether a layer's router is at one place all the time."""
        copied = self.split is not None and self.split.places[layer] is Place.COPIED
        return layer < self.residency.layers and not copied


def place_layers(
    model: Any,
    pack: FlashPack,
    budget: int | None,
    operators: list[FlashDecoderLayer],
    accelerator: Accelerator | None,
    places: Sequence[Place] | None = None,
) -> Placement:
    """Measure, and choose what is predicted to be quickest; never what is predicted to be slower
    than the CPU alone.

    Args:
        places: of all layers, instead of measuring; those that stay come first.

    Raises:
        BudgetError: the DRAM budget is below what one pass needs.
        FlashError: a layer cannot be read.
    """
    alone = Placement(plan_residency(pack, budget), None)
    if accelerator is None:
        return alone
    if places is not None:
        split = Split(tuple(places), 0.0, 0.0, head=True, experts=True)
        return Placement(plan_residency(pack, budget, elsewhere=split.stays), split)
    free_bytes = accelerator.free_bytes - kv_cache_bytes(model.config, CONTEXT)
    if not list(_fitting(pack, free_bytes)):
        logger.warning(
            "%s is not used: beside keys and values of %d tokens, %s of its memory hold no layer",
            accelerator.label, CONTEXT, human(max(0, free_bytes)),
        )  # fmt: skip
        return alone
    measured = measure(model, pack, operators, accelerator)
    best = choose(pack, budget, measured, free_bytes, _head_bytes(model), model.config)
    if best is None:
        logger.warning(
            "%s is not used: by the measured costs a pass is no quicker with it", accelerator.label
        )
        return alone
    logger.info("%s", best.line(accelerator.label))
    return Placement(plan_residency(pack, budget, elsewhere=best.stays), best)


def choose(
    pack: FlashPack,
    budget: int | None,
    measured: Measured,
    free_bytes: int,
    head_bytes: int,
    config: Any,
) -> Split | None:
    """The quickest split that fits; None where the CPU alone is as quick.

    Args:
        free_bytes: of the accelerator, for weights.
        config: of the model; says how many experts a token chooses.
    """
    experts = _experts_in_pass(pack, config)
    alone = plan_residency(pack, budget)
    costs = _with_experts(_costs(measured, alone), measured, experts, there=False)
    rings = Rings(max(1, alone.ring), DEVICE_RING, measured.hop_us)
    cpu_us = pass_us(costs, [Place.CPU] * len(costs), rings) + HEAD_ROWS * measured.head_cpu_us
    candidates = []
    for head in (False, True):
        for stays in _fitting(pack, free_bytes - (head_bytes if head else 0)):
            residency = plan_residency(pack, budget, elsewhere=stays)
            rings = Rings(max(1, residency.ring), DEVICE_RING, measured.hop_us)
            for there in (False, True) if experts else (False,):
                costs = _with_experts(_costs(measured, residency), measured, experts, there)
                found = choose_places(costs, stays, rings)
                us = found.pass_us + HEAD_ROWS * (
                    measured.head_device_us if head else measured.head_cpu_us
                )
                candidates.append(replace(found, pass_us=us, head=head, experts=there))
    return best_of(candidates, cpu_us)


def split_stream(
    stream: LayerStream, placement: Placement, accelerator: Accelerator | None
) -> tuple[LayerStream | SplitStream, Carrier | None]:
    """(what hands out layers, what brings inputs to them).

    Raises:
        FlashError: a layer that lives on the accelerator cannot be read.
    """
    if placement.split is None or accelerator is None:
        return stream, None
    split = SplitStream(stream, accelerator, placement.split.places, DEVICE_RING)
    there = [split.on_device(layer) for layer in range(len(stream.layers))]
    return split, Carrier(accelerator.device, there)


def move_head(model: Any, placement: Placement, accelerator: Accelerator | None) -> None:
    """Let the accelerator project where the split says so. Mutates: the model."""
    if accelerator is not None and placement.split is not None and placement.split.head:
        model.set_output_embeddings(DeviceHead(model.get_output_embeddings(), accelerator.device))


def _fitting(pack: FlashPack, free_bytes: int) -> Iterator[int]:
    """How many first layers may stay: none, and as many as fit beside the buffers of the others."""
    layers = pack.blocks("layer")
    left = free_bytes - DEVICE_RING * block_memory(layers)
    if sum(block.nbytes for block in layers) <= free_bytes:
        yield len(layers)
    if left < 0:
        return
    yield 0
    count = 0
    while count < len(layers) - 1 and layers[count].nbytes <= left:
        left -= layers[count].nbytes
        count += 1
    if count:
        yield count


def _costs(measured: Measured, residency: Residency) -> list[LayerCosts]:
    return [
        cost.in_dram() if layer < residency.layers else cost
        for layer, cost in enumerate(measured.layers)
    ]


def _experts_in_pass(pack: FlashPack, config: Any) -> dict[int, float]:
    """Layer -> distinct experts that a tree's rows are expected to choose, if they chose
    at random.
    """
    blocks = pack.blocks("expert")
    found = {}
    for layer in {block.layer for block in blocks}:
        count = sum(block.layer == layer for block in blocks)
        found[layer] = count * (1 - (1 - config.num_experts_per_tok / count) ** ROWS)
    return found


def _with_experts(
    costs: list[LayerCosts], measured: Measured, experts: dict[int, float], there: bool
) -> list[LayerCosts]:
    """Layers with their routed experts, on the accelerator or not; hidden states go over to them
    and back.
    """
    one, over = measured.expert_device_us if there else measured.expert_cpu_us, 2 * measured.hop_us
    return [
        replace(
            cost,
            cpu_us=cost.cpu_us + experts[layer] * one + (over if there else 0.0),
            device_us=cost.device_us + experts[layer] * one + (0.0 if there else over),
        )
        if layer in experts
        else cost
        for layer, cost in enumerate(costs)
    ]


def _head_bytes(model: Any) -> int:
    return int(model.get_output_embeddings().weight.nbytes)
