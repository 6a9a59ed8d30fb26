"""One MoE layer call: learn -> plan -> run -> look ahead.

The engine owns no policy and no kernel. It asks the controller what to do, hands the answer to the backends and
adds up the parts. It is owned by one model; several can live in one process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.experts.base import Accelerator, CPUBackend
from hybrimoe_plugin.experts.weights import LayerWeights
from hybrimoe_plugin.policy.controller import Controller, Move, Step, loads
from hybrimoe_plugin.policy.schedule import simulate
from hybrimoe_plugin.timeline import Timeline


class Router(Protocol):
    """What the engine may ask of the model's own router; the routing itself stays the model's code."""

    def scores(self) -> torch.Tensor | None:
        """[T, E] float32 scores of the running call, None where the host does not show them."""
        ...

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, K] int64 ids that this router would choose for hidden states [T, H] of an earlier layer."""
        ...


@dataclass(frozen=True)
class CallRecord:
    """The routing of one layer call, as handed to a recorder."""

    layer: int
    topk_ids: NDArray[np.int64]
    """[T, K]"""
    topk_weights: NDArray[np.float32]
    """[T, K]"""
    scores: NDArray[np.float32] | None
    """[T, E]"""
    predicted: tuple[NDArray[np.int64], ...]
    """[T, K] ids for the next layers, nearest first."""


class WallClock:
    """Real time; the hardware decides when a call ends."""

    emulated = False

    def now_us(self) -> float:
        return perf_counter_ns() / 1e3


class SimulatedClock:
    """Time that passes only as the machine profile says; every number taken from it is emulated."""

    emulated = True

    def __init__(self) -> None:
        self._now_us = 0.0

    def now_us(self) -> float:
        return self._now_us

    def advance(self, us: float) -> None:
        self._now_us += us


class Engine:
    """Runs the routed experts of one model on one accelerator (or none) and the CPU.

    Args:
        layers: the MoE layers' weights, in order; `run`'s `layer` is the position in this list.
        routers: the same layers' routers.
        look_ahead: how many later layers are predicted for prefetching; 0 for none.
        clock: real time, or simulated where the accelerator is emulated.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        routers: Sequence[Router],
        controller: Controller,
        cpu: CPUBackend,
        accelerator: Accelerator | None,
        clock: WallClock | SimulatedClock,
        look_ahead: int,
    ) -> None:
        self.layers = list(layers)
        self.routers = list(routers)
        self.controller = controller
        self.cpu = cpu
        self.accelerator = accelerator
        self.clock = clock
        self.look_ahead = look_ahead if accelerator is not None else 0
        self.wave = controller.pool.staging // 2
        self.timeline: Timeline | None = None
        self.recorder: Callable[[CallRecord], None] | None = None
        for move in controller.warm_start() if accelerator is not None else ():
            accelerator.onload(move.slot, self.layers[move.layer], move.expert)  # type: ignore[union-attr]

    def run(self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Compute the routed experts of one layer call.

        Args:
            hidden: [T, H] floating point, on the device of the model's dense part.
            topk_ids: [T, K] integer expert ids.
            topk_weights: [T, K] floating point routing weights; a weight belongs to the id at its own place.

        Returns:
            [T, H] sum over each token's experts, dtype and device of `hidden`.
        """
        if hidden.shape[0] == 0:
            return torch.zeros_like(hidden)
        now_us = self.clock.now_us()
        ids = topk_ids.to("cpu", torch.int64)  # the one host synchronisation of a call on a GPU
        weights = topk_weights.to("cpu", torch.float32)
        ids_np = ids.numpy()
        scores = self._learn(layer, ids_np, weights.numpy())
        step = self.controller.begin(layer, loads(ids_np), len(ids_np), now_us)
        submitted = bool(step.plan.cpu)
        try:
            if submitted:
                self.cpu.submit(layer, hidden.to("cpu"), ids, weights, step.plan.cpu)
            output = self._accelerate(step, hidden, topk_ids, topk_weights)
            self._look_ahead(step, hidden, ids_np, weights.numpy(), scores, now_us)
        finally:
            # An interrupted call must leave no task behind and no slot leased.
            from_cpu = self.cpu.sync() if submitted else None
            self.controller.finish(step)
        if from_cpu is not None:
            from_cpu = from_cpu.to(hidden.device, hidden.dtype)
            output = from_cpu if output is None else output + from_cpu
        assert output is not None, "a plan covers every routed expert"
        self._pass_time(step, now_us)
        return output

    def close(self) -> None:
        """Give back threads and device memory."""
        self.cpu.close()
        if self.accelerator is not None:
            self.accelerator.close()

    def _accelerate(
        self, step: Step, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Run the accelerator's share in waves: what is there, what is in flight, then demand loads as they come."""
        if self.accelerator is None or not step.plan.accelerator:
            return None
        device = self.accelerator.device
        arguments = hidden.to(device), topk_ids.to(device, torch.int64), topk_weights.to(device)
        slots = self.controller.pool.cached[step.layer]
        demanded = {move.expert for move in step.moves}
        waiting: deque[dict[int, int]] = deque(self._present_waves(step, slots, demanded))
        output: torch.Tensor | None = None
        for first in range(0, len(step.moves), self.wave):
            # Send a wave before computing the one before it, so that link and accelerator overlap.
            batch = step.moves[first : first + self.wave]
            for move in batch:
                self.accelerator.onload(move.slot, self.layers[step.layer], move.expert)
            while waiting:
                output = self._wave(waiting.popleft(), output, *arguments)
            waiting.append({move.expert: move.slot for move in batch})
        while waiting:
            output = self._wave(waiting.popleft(), output, *arguments)
        assert output is not None
        return output.to(hidden.device, hidden.dtype)

    @staticmethod
    def _present_waves(step: Step, slots: dict[int, int], demanded: set[int]) -> list[dict[int, int]]:
        """Expert -> slot of the resident experts, then of those in flight, leaving out empty waves."""
        in_flight = {routed.expert for routed in step.routed if routed.ready_us > 0}
        present = [expert for expert in step.plan.accelerator if expert not in demanded]
        waves = (
            {expert: slots[expert] for expert in present if expert not in in_flight},
            {expert: slots[expert] for expert in present if expert in in_flight},
        )
        return [wave for wave in waves if wave]

    def _wave(
        self,
        wave: dict[int, int],
        output: torch.Tensor | None,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        assert self.accelerator is not None
        table = np.full(self.layers[0].spec.experts, -1, dtype=np.int64)
        for expert, slot in wave.items():
            table[expert] = slot
        slot_ids = torch.from_numpy(table).to(hidden.device, non_blocking=True)[topk_ids]
        part = self.accelerator.compute(tuple(wave.values()), hidden, slot_ids, topk_weights)
        return part if output is None else output + part

    def _learn(self, layer: int, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Tell the cache what was scored before it is asked what to admit; gives the scores [T, E] if there are any."""
        if self.accelerator is None and self.recorder is None:
            return None
        shown = self.routers[layer].scores()
        scores = None if shown is None else shown.to("cpu", torch.float32).numpy()
        if self.accelerator is not None:
            self.controller.learn(layer, ids, weights, scores)
        return scores

    def _look_ahead(
        self,
        step: Step,
        hidden: torch.Tensor,
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        scores: NDArray[np.float32] | None,
        now_us: float,
    ) -> None:
        """Predict the next layers and use the idle link; runs while CPU and accelerator compute."""
        if self.accelerator is None and self.recorder is None:
            return
        predicted = [
            (later, self.routers[later].predict(hidden).to("cpu", torch.int64).numpy())
            for later in range(step.layer + 1, min(step.layer + 1 + self.look_ahead, len(self.layers)))
        ]
        if self.recorder is not None:
            self.recorder(CallRecord(step.layer, ids, weights, scores, tuple(found for _, found in predicted)))
        if self.accelerator is None:
            return
        moves = self.controller.look_ahead(step, [(later, loads(found)) for later, found in predicted], now_us)
        for move in moves:
            self.accelerator.onload(move.slot, self.layers[move.layer], move.expert)
        if self.timeline is not None:
            self._draw_link(moves)

    def _pass_time(self, step: Step, now_us: float) -> None:
        """Advance the clock over this call and draw it."""
        costs, plan = self.controller.costs, step.plan
        if isinstance(self.clock, SimulatedClock):
            spent_us = plan.makespan_us
            self.clock.advance(spent_us + costs.between_layers_us)
        else:
            spent_us = self.clock.now_us() - now_us
        self.controller.counters.moe_us += spent_us
        if self.timeline is not None:
            run = simulate(plan, step.routed, costs, 0.0)
            self.timeline.layer_call(step.layer, now_us, spent_us, run, emulated=self.clock.emulated)
            self._draw_link(step.moves)

    def _draw_link(self, moves: Sequence[Move]) -> None:
        assert self.timeline is not None
        for move in moves:
            self.timeline.transfer(move.layer, move.expert, move.start_us, move.end_us)
