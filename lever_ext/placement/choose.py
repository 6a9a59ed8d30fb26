"""Decides which parts of a target an accelerator computes, and sets them up there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrimoe_plugin.device.memory import human
from hybrimoe_plugin.engine.sizing import kv_cache_bytes
from hybrimoe_plugin.weights.layer_weights import chosen_experts
from lever_ext.flash.dram_plan import DramPlan, plan_dram
from lever_ext.flash.pack import FlashPack, block_memory
from lever_ext.flash.stream import LayerStream
from lever_ext.operators.decoder import FlashDecoderLayer
from lever_ext.operators.head import DeviceHead
from lever_ext.operators.transfer import LayerTransfer
from lever_ext.placement.device import TargetDevice
from lever_ext.placement.measure import TREE_SIZE, Measured, measure
from lever_ext.placement.split import (
    LayerCosts,
    Place,
    Rings,
    Split,
    best_of,
    choose_places,
    pass_us,
)
from lever_ext.placement.split_stream import SplitStream

logger = logging.getLogger(__name__)

DEVICE_RING = 3
"""Accelerator buffers for copied layers: one is computed, one is complete, one arrives."""
CONTEXT = 4096
"""Tokens whose keys and values are left room for."""
HEAD_CALLS = 4
"""Projections in a pass: one for each accepted token."""


@dataclass(frozen=True)
class Placement:
    """Where a target's layers compute, and the DRAM that they take."""

    dram_plan: DramPlan
    split: Split | None
    """None where everything computes on the CPU."""

    @property
    def stays(self) -> int:
        """First layers that live on the accelerator."""
        return 0 if self.split is None else self.split.stays

    def experts_on(self, accelerator: TargetDevice | None) -> Any:
        """The device that computes routed experts; None for the CPU."""
        if accelerator is None or self.split is None or not self.split.experts:
            return None
        return accelerator.device

    def keeps_router(self, layer: int) -> bool:
        """Whether a layer's router is at one place all the time."""
        copied = self.split is not None and self.split.places[layer] is Place.COPIED
        return layer < self.dram_plan.layers and not copied


def place_layers(
    model: Any,
    pack: FlashPack,
    budget: int | None,
    operators: Sequence[FlashDecoderLayer],
    accelerator: TargetDevice | None,
    places: Sequence[Place] | None = None,
) -> Placement:
    """Measure, and choose what is predicted to be fastest.

    Never what is predicted to be slower than the CPU alone.

    Args:
        model: its resident parts are loaded.
        pack: of its weights.
        budget: bytes of DRAM; None for no limit.
        operators: the decoder layers; not bound to a stream yet.
        accelerator: None for the CPU alone.
        places: of all layers, instead of measuring; those that stay come first.

    Raises:
        BudgetError: the DRAM budget is below what one pass needs.
        FlashError: a layer cannot be read.
    """
    alone = Placement(plan_dram(pack, budget), None)
    if accelerator is None:
        return alone
    if places is not None:
        split = Split(tuple(places), 0.0, 0.0, head=True, experts=True)
        return Placement(plan_dram(pack, budget, elsewhere=split.stays), split)
    free_bytes = accelerator.free_bytes - kv_cache_bytes(model.config, CONTEXT)
    if not list(_fitting(pack, free_bytes)):
        logger.warning(
            "%s is not used: beside keys and values of %d tokens, %s of its memory hold no layer",
            accelerator.label,
            CONTEXT,
            human(max(0, free_bytes)),
        )
        return alone
    measured = measure(model, pack, operators, accelerator)
    head_bytes = int(model.get_output_embeddings().weight.nbytes)
    best = choose(pack, budget, measured, free_bytes, head_bytes, model.config)
    if best is None:
        logger.warning(
            "%s is not used: by the measured costs a pass is no faster with it", accelerator.label
        )
        return alone
    logger.info("%s", best.line(accelerator.label))
    return Placement(plan_dram(pack, budget, elsewhere=best.stays), best)


def choose(
    pack: FlashPack,
    budget: int | None,
    measured: Measured,
    free_bytes: int,
    head_bytes: int,
    config: Any,
) -> Split | None:
    """The fastest split that fits; None where the CPU alone is as fast.

    Args:
        pack: the target.
        budget: bytes of DRAM; None for no limit.
        measured: costs of the target's parts.
        free_bytes: of the accelerator, for weights.
        head_bytes: of the output head.
        config: of the model; says how many experts a token chooses.
    """
    experts = _experts_in_pass(pack, config)
    costs = _Costs(measured, experts)
    alone = plan_dram(pack, budget)
    layers = costs.of_layers(alone, experts_there=False)
    on_cpu = [Place.CPU] * len(layers)
    cpu_us = pass_us(layers, on_cpu, costs.rings(alone)) + costs.head_us(there=False)
    candidates = []
    for head in (False, True):
        left = free_bytes - (head_bytes if head else 0)
        for stays in _fitting(pack, left):
            plan = plan_dram(pack, budget, elsewhere=stays)
            for there in (False, True) if experts else (False,):
                layers = costs.of_layers(plan, experts_there=there)
                split = choose_places(layers, stays, costs.rings(plan))
                us = split.pass_us + costs.head_us(there=head)
                candidates.append(replace(split, pass_us=us, head=head, experts=there))
    return best_of(candidates, cpu_us)


def split_stream(
    stream: LayerStream,
    placement: Placement,
    accelerator: TargetDevice | None,
) -> tuple[LayerStream | SplitStream, LayerTransfer | None]:
    """(what hands out layers, what brings inputs to them).

    Raises:
        FlashError: a layer that lives on the accelerator cannot be read.
    """
    if placement.split is None or accelerator is None:
        return stream, None
    split = SplitStream(stream, accelerator, placement.split.places, DEVICE_RING)
    on_device = [split.on_device(layer) for layer in range(len(stream.layers))]
    return split, LayerTransfer(accelerator.device, on_device)


def move_head(model: Any, placement: Placement, accelerator: TargetDevice | None) -> None:
    """Let the accelerator compute the output head where the split says so. Mutates: the model."""
    if accelerator is not None and placement.split is not None and placement.split.head:
        head = model.get_output_embeddings()
        model.set_output_embeddings(DeviceHead(head, accelerator.device))


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


def _experts_in_pass(pack: FlashPack, config: Any) -> dict[int, float]:
    """Layer -> distinct experts that a tree's tokens would choose at random."""
    layers = [block.layer for block in pack.blocks("expert")]
    found = {}
    for layer in set(layers):
        experts = layers.count(layer)
        unchosen = (1 - chosen_experts(config) / experts) ** TREE_SIZE
        found[layer] = experts * (1 - unchosen)
    return found


@dataclass(frozen=True)
class _Costs:
    """What parts of a pass cost in a placement."""

    measured: Measured
    experts: Mapping[int, float]
    """Layer -> distinct experts in a pass."""

    def rings(self, plan: DramPlan) -> Rings:
        return Rings(max(1, plan.ring), DEVICE_RING, self.measured.hop_us)

    def head_us(self, there: bool) -> float:
        """All projections of a pass, on the accelerator or not."""
        one = self.measured.head_device_us if there else self.measured.head_cpu_us
        return HEAD_CALLS * one

    def of_layers(self, plan: DramPlan, experts_there: bool) -> list[LayerCosts]:
        """The layers with their routed experts, which are on the accelerator or not."""
        found = []
        for layer, cost in enumerate(self.measured.layers):
            in_place = cost.in_dram() if layer < plan.layers else cost
            found.append(self._with_experts(layer, in_place, experts_there))
        return found

    def _with_experts(self, layer: int, cost: LayerCosts, there: bool) -> LayerCosts:
        """Hidden states go over to experts on the other side and back."""
        if layer not in self.experts:
            return cost
        one = self.measured.expert_device_us if there else self.measured.expert_cpu_us
        experts_us = self.experts[layer] * one
        there_and_back = 2 * self.measured.hop_us
        return replace(
            cost,
            cpu_us=cost.cpu_us + experts_us + (there_and_back if there else 0.0),
            device_us=cost.device_us + experts_us + (0.0 if there else there_and_back),
        )
