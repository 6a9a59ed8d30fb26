"""The accelerator's share of a layer call, in waves over the staging slots.

A wave is a set of experts that one launch computes. Resident experts come first, then those in
flight, then demand loads in groups of half the staging slots. So while one half is computed, the
link fills the other one. With 4 staging slots and demand loads of experts a to e:

    link          a -> 0  b -> 1  c -> 2  d -> 3  e -> 0
    accelerator   | resident | in flight | a b | c d | e |
    sent before   | a b      | -         | c d | e   | - |     each wave is sent one wave early
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.backends import Accelerator, WaveCalls
from hybrimoe_plugin.core import OFFLOADED, ExpertRef
from hybrimoe_plugin.engine.view import Sent
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.policy.controller import Controller, Move, Step
from hybrimoe_plugin.policy.step import FEW_ROWS
from hybrimoe_plugin.weights.layer_weights import LayerWeights

Wave = dict[int, int]
"""Expert -> slot of what is computed in one launch."""

WAVE_US = 50.0
"""What one more wave of one token costs the host, two launches by Triton included."""


class Waves:
    """Sends experts to their slots and computes them, so that link and accelerator overlap."""

    def __init__(
        self, accelerator: Accelerator, layers: Sequence[LayerWeights], controller: Controller
    ) -> None:
        self._accelerator = accelerator
        self._layers = layers
        self._controller = controller

    def onload(self, moves: Iterable[Move], ahead: bool = False) -> None:
        """Queue transfers on the link; `ahead` for prefetches."""
        for layer, expert, slot, *_ in moves:
            self._accelerator.onload(slot, self._layers[layer], expert, ahead)

    def compute(
        self,
        step: Step,
        hidden: torch.Tensor,
        ids: NDArray[np.int64],
        topk_weights: torch.Tensor,
        sent: Sent | None = None,
    ) -> torch.Tensor | None:
        """Compute the accelerator's experts of one layer call.

        Args:
            step: the planned call.
            hidden: [T, H] floating point, on the device of the model's dense part.
            ids: [T, K] on the host.
            topk_weights: [T, K] floating point, beside `hidden`.
            sent: of a graph, which may compute experts in slots by itself.

        Returns:
            [T, H] like `hidden`: the weighted sum over each token's experts; None where the plan
            gives the accelerator nothing.
        """
        if not step.plan.accelerator:
            return None
        if sent is not None and sent.finds_slots:
            joined = self._joined(step)
            if joined:
                self.onload(step.moves)
                output = sent.from_slots(joined)
                self._cancel_stale(step)
                return output
        else:
            sent = None
        self._cancel_stale(step)
        return self._compute_waves(step, hidden, ids, topk_weights, sent)

    def _compute_waves(
        self,
        step: Step,
        hidden: torch.Tensor,
        ids: NDArray[np.int64],
        topk_weights: torch.Tensor,
        first: Sent | None,
    ) -> torch.Tensor:
        """As `compute`, in waves.

        Args:
            first: of a graph that computes the first wave; None where the others are like it.
        """
        waves = self._present(step)
        present = len(waves)
        groups = self._demand_groups(step)
        for group in groups:
            waves.append({move.expert: move.slot for move in group})
        unsent = iter(groups)
        self.onload(next(unsent, ()))
        accelerator = self._accelerator
        states, weights = hidden, topk_weights
        apart = hidden.device != accelerator.device  # asked once: each comparison costs the host
        if apart:
            states = self.to_device(hidden, accelerator.device)
            weights = self.to_device(topk_weights, accelerator.device)
        by_graph = None if first is None else first.from_slots(waves[0])
        if by_graph is not None and len(waves) == 1:
            return by_graph
        layer = self._layers[step.layer]
        calls = wave_calls(accelerator, layer, waves, ids, states, weights)
        for index in range(len(waves)):
            if index >= present:
                # Send a group before computing the one before it: link and accelerator overlap.
                self.onload(next(unsent, ()))
            if index or by_graph is None:
                calls.compute(index)
        output = calls.output()
        if apart:
            output = output.to(hidden.device)
        return output if by_graph is None else by_graph + output

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor on the device; from the CPU to the accelerator without stopping the host."""
        if tensor.device.type == "cpu" and device == self._accelerator.device:
            return self._accelerator.copy_to_device(tensor)
        return tensor.to(device)

    def resynchronise(self) -> None:
        """After an unfinished call: make the controller's books say what the slots hold."""
        pool = self._controller.pool
        if self._accelerator.slots != pool.slots:  # it ended while slots were given back
            self._accelerator.allocate(pool.slots, self._layers)
        positions = {id(weights): index for index, weights in enumerate(self._layers)}
        held = {}
        for slot, (weights, expert) in self._accelerator.settle().items():
            held[slot] = ExpertRef(positions[id(weights)], expert)
        self._controller.recover(held)

    def check_integrity(self) -> None:
        """Compare the controller's books and the slots with the file's bytes; slow.

        Raises:
            BackendError: they differ.
        """
        pool = self._controller.pool
        try:
            pool.check_integrity()
        except AssertionError as error:
            raise BackendError(f"the books of the expert cache are wrong: {error}") from None
        expected = {}
        for weights, cached in zip(self._layers, pool.cached, strict=True):
            for expert, slot in cached.items():
                expected[slot] = (weights, expert)
        wrong = self._accelerator.wrong_slots(expected)
        if wrong:
            weights, expert = expected[wrong[0]]
            raise BackendError(
                f"slot {wrong[0]} does not hold expert {expert} of layer {weights.layer} as the "
                f"file has it (wrong: {len(wrong)} of {len(expected)} slots)"
            )

    def _cancel_stale(self, step: Step) -> None:
        """Cancel prefetches for this layer that it does not need and the link has not begun."""
        for expert, slot in self._controller.stale(step):
            if self._accelerator.cancel(slot):
                self._controller.withdraw(step.layer, expert)

    def _joined(self, step: Step) -> Wave:
        """All waves as one, behind the last arrival, where that is done sooner; else empty.

        It is where the host takes longer for one more wave than the accelerator for what is there.
        """
        moves, mine = step.moves, step.plan.accelerator
        there = [item.load for item in step.routed if item.ready_us == 0]
        if len(there) < len(mine):
            costs = self._controller.costs
            there_us = costs.accelerator_first_us + sum(map(costs.accelerator, there))
            if there_us > WAVE_US or len(moves) > self._group_size():
                return {}
        cached = self._controller.pool.cached[step.layer]
        demanded = {move.expert: move.slot for move in moves}
        return {e: demanded[e] if e in demanded else cached[e] for e in mine}

    def _present(self, step: Step) -> list[Wave]:
        """The resident experts, then those in flight; without empty waves."""
        slots = self._controller.pool.cached[step.layer]
        later = {expert: ready_us for expert, _, ready_us in step.routed if ready_us > 0}
        resident: Wave = {}
        in_flight: Wave = {}
        for expert in step.plan.accelerator:
            if expert not in later:
                resident[expert] = slots[expert]
            elif later[expert] < OFFLOADED:  # others are demand loads
                in_flight[expert] = slots[expert]
        return [wave for wave in (resident, in_flight) if wave]

    def _demand_groups(self, step: Step) -> list[Sequence[Move]]:
        """Demand loads in link order, as many at a time as half the staging slots that are left."""
        size = self._group_size()
        starts = range(0, len(step.moves), size)
        return [step.moves[start : start + size] for start in starts]

    def _group_size(self) -> int:
        return self._controller.pool.unlent_staging // 2


class SlotCalls:
    """Waves that know nothing of one another: each has slot ids, and a sum that is added up.

    Args:
        ids: [T, K] on the host.
        experts: number of experts E.
        states: [T, H] on the device.
        weights: [T, K] on the device.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        waves: Sequence[Wave],
        ids: NDArray[np.int64],
        experts: int,
        states: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        self._accelerator = accelerator
        self._waves = waves
        self._states = states
        self._weights = weights
        self._slot_ids = _slot_ids(accelerator, waves, ids, experts)
        self._output: torch.Tensor | None = None

    def compute(self, index: int) -> None:
        part = self._accelerator.compute(
            tuple(self._waves[index].values()), self._states, self._slot_ids[index], self._weights
        )
        self._output = part if self._output is None else self._output + part

    def output(self) -> torch.Tensor:
        assert self._output is not None
        return self._output


def wave_calls(
    accelerator: Accelerator,
    layer: LayerWeights,
    waves: Sequence[Wave],
    ids: NDArray[np.int64],
    states: torch.Tensor,
    weights: torch.Tensor,
) -> WaveCalls:
    """How waves are computed: together where experts have many tokens, else each by itself.

    Args:
        waves: none of them empty.
        ids: [T, K] on the host.
        states: [T, H] floating point on the accelerator.
        weights: [T, K] floating point on the accelerator.
    """
    if len(ids) > 1:
        call = accelerator.prompt_call(layer, waves, ids, states, weights)
        if call is not None:
            return call
    return SlotCalls(accelerator, waves, ids, layer.spec.experts, states, weights)


def _slot_ids(
    accelerator: Accelerator, waves: Sequence[Wave], ids: NDArray[np.int64], experts: int
) -> Sequence[torch.Tensor] | torch.Tensor:
    """[T, K] int64 for each wave, on the accelerator: the slot of each routed expert.

    It is -1 where the wave does not compute the expert. For few tokens valid until the next call.

    Args:
        experts: number of experts E.
    """
    if len(ids) == 1:
        (chosen,) = ids.tolist()
        slot_ids = []
        for wave in waves:
            for expert in chosen:
                slot_ids.append(wave.get(expert, -1))
        return accelerator.send_slot_ids(slot_ids, len(waves))
    slots = np.full((len(waves), experts), -1, dtype=np.int64)
    for slot_of_expert, wave in zip(slots, waves, strict=True):
        slot_of_expert[list(wave)] = list(wave.values())
    found = slots.take(ids, axis=1)
    if len(ids) <= FEW_ROWS:
        return accelerator.send_slot_table(found)
    return accelerator.copy_to_device(torch.from_numpy(found))
