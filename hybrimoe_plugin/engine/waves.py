"""The accelerator's share of a layer call: what is there, what is in flight, then demand loads as
they come.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.backends import Accelerator
from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.policy.controller import Controller, Move, Step
from hybrimoe_plugin.weights.layer_weights import LayerWeights

Wave = dict[int, int]
"""Expert -> slot of what is computed in one launch."""


class Waves:
    """Sends experts and computes them, one wave behind the other, so that link and accelerator
    overlap.
    """

    def __init__(
        self, accelerator: Accelerator, layers: Sequence[LayerWeights], controller: Controller
    ) -> None:
        self._accelerator = accelerator
        self._layers = layers
        self._controller = controller
        self._size = controller.pool.staging // 2

    def onload(self, moves: Sequence[Move], ahead: bool = False) -> None:
        """Queue transfers on the link."""
        for move in moves:
            self._accelerator.onload(move.slot, self._layers[move.layer], move.expert, ahead)

    def recover(self) -> None:
        """After a call that did not end: the controller's books again say what the slots hold."""
        pool = self._controller.pool
        if self._accelerator.slots != pool.slots:  # it ended while slots were given back
            self._accelerator.allocate(pool.slots, self._layers)
        positions = {id(weights): place for place, weights in enumerate(self._layers)}
        held = self._accelerator.settle()
        self._controller.recover(
            {s: ExpertRef(positions[id(weights)], e) for s, (weights, e) in held.items()}
        )

    def check_integrity(self) -> None:
        """Compare books and slots with the file's bytes; slow. Raises: BackendError."""
        pool = self._controller.pool
        try:
            pool.check_integrity()
        except AssertionError as error:
            raise BackendError(f"the books of the expert cache are wrong: {error}") from None
        expected = {
            slot: (weights, expert)
            for weights, cached in zip(self._layers, pool.cached, strict=True)
            for expert, slot in cached.items()
        }
        wrong = self._accelerator.wrong_slots(expected)
        if wrong:
            weights, expert = expected[wrong[0]]
            raise BackendError(
                f"slot {wrong[0]} does not hold expert {expert} of layer {weights.layer} as the "
                f"file has it "
                f"(wrong: {len(wrong)} of {len(expected)} slots)"
            )

    def place(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor on the device; from the CPU to the accelerator without stopping the host."""
        if tensor.device.type == "cpu" and device == self._accelerator.device:
            return self._accelerator.place(tensor)
        return tensor.to(device)

    def run(
        self, step: Step, hidden: torch.Tensor, ids: NDArray[np.int64], topk_weights: torch.Tensor
    ) -> torch.Tensor | None:
        """[T, H] sum over the accelerator's experts of each token, like `hidden`; None where there
        are none.

        Args:
            ids: [T, K] on the host.
        """
        if not step.plan.accelerator:
            return None
        self._cancel(step)
        present = _present(step, self._controller.pool.cached[step.layer])
        batches = [
            step.moves[first : first + self._size]
            for first in range(0, len(step.moves), self._size)
        ]
        waves = [*present, *({move.expert: move.slot for move in batch} for batch in batches)]
        unsent = iter(batches)
        self.onload(next(unsent, ()))
        device = self._accelerator.device
        states, weights = self.place(hidden, device), self.place(topk_weights, device)
        slot_ids = self._accelerator.place(_slot_ids(waves, ids, self._layers[0].spec.experts))
        output: torch.Tensor | None = None
        for index, wave in enumerate(waves):
            if index >= len(present):
                # Send a wave before computing the one before it, so that link and accelerator
                # overlap.
                self.onload(next(unsent, ()))
            part = self._accelerator.compute(tuple(wave.values()), states, slot_ids[index], weights)
            output = part if output is None else output + part
        assert output is not None
        return output.to(hidden.device, hidden.dtype)

    def _cancel(self, step: Step) -> None:
        """Take back prefetches for this layer that it does not need, where the link has not begun
        with them.
        """
        for expert, slot in self._controller.stale(step):
            if self._accelerator.cancel(slot):
                self._controller.withdraw(step.layer, expert)


def _present(step: Step, slots: Wave) -> list[Wave]:
    """The resident experts, then those in flight, leaving out empty waves."""
    demanded = {move.expert for move in step.moves}
    in_flight = {routed.expert for routed in step.routed if routed.ready_us > 0}
    present = [expert for expert in step.plan.accelerator if expert not in demanded]
    waves = (
        {expert: slots[expert] for expert in present if expert not in in_flight},
        {expert: slots[expert] for expert in present if expert in in_flight},
    )
    return [wave for wave in waves if wave]


def _slot_ids(waves: Sequence[Wave], ids: NDArray[np.int64], experts: int) -> torch.Tensor:
    """[W, T, K] int64: the slot of each routed expert in each wave, -1 where it is not computed
    there.
    """
    if len(ids) == 1:
        row = ids[0].tolist()
        return torch.from_numpy(
            np.array([[[wave.get(expert, -1) for expert in row]] for wave in waves])
        )
    table = np.full((len(waves), experts), -1, dtype=np.int64)
    for line, wave in zip(table, waves, strict=True):
        line[list(wave)] = list(wave.values())
    return torch.from_numpy(table[:, ids])
