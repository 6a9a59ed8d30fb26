"""One MoE layer call: learn -> plan -> run -> look ahead.

The engine owns no policy and no kernel. It asks the controller what to do, hands the answer to the backends and
adds up the parts. It is owned by one model; several can live in one process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.errors import BudgetError
from hybrimoe_plugin.experts.base import Accelerator, CPUBackend, WholeCalls
from hybrimoe_plugin.experts.streams import Coming
from hybrimoe_plugin.experts.weights import LayerWeights
from hybrimoe_plugin.policy.controller import Controller, Move, Step, loads
from hybrimoe_plugin.policy.schedule import simulate
from hybrimoe_plugin.timeline import Timeline

log = logging.getLogger(__name__)

SHRINK_TO = 0.75
"""Share of the cached experts that is kept when the device runs out of memory."""


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


class Sent(Protocol):
    """What a CUDA graph sends to the host of a layer call; asked for in this order, once."""

    def needed(self) -> Coming:
        """Hidden states, ids, weights, and scores where the router shows any."""
        ...

    def predicted(self) -> Coming | None:
        """Ids that the later routers would choose, nearest first."""
        ...


class HostView(NamedTuple):
    """What the host must know of a layer call; brought over in one synchronisation, predictions behind it."""

    hidden: torch.Tensor
    """[T, H] on the CPU, for the CPU's experts."""
    ids: torch.Tensor
    """[T, K] int64"""
    weights: torch.Tensor
    """[T, K] float32"""
    scores: NDArray[np.float32] | None
    """[T, E]"""
    coming: Coming | None
    """[T, K] ids for the next layers, nearest first; on their way while the layer is planned."""

    def predicted(self, wait: bool = False) -> tuple[NDArray[np.int64], ...]:
        """The predictions that have arrived: all or none. Stops the host only where asked to."""
        if self.coming is None:
            return ()
        tensors = self.coming.wait() if wait else self.coming.now()
        return tuple(found.to(torch.int64).numpy() for found in tensors or ())


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
        self._whole_calls = accelerator is None and isinstance(cpu, WholeCalls)
        for move in controller.warm_start() if accelerator is not None else ():
            accelerator.onload(move.slot, self.layers[move.layer], move.expert)  # type: ignore[union-attr]

    def later_routers(self, layer: int) -> list[Router]:
        """The routers whose choices are predicted at this layer, nearest first."""
        return self.routers[layer + 1 : layer + 1 + self.look_ahead]

    def run(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        sent: Sent | None = None,
    ) -> torch.Tensor:
        """Compute the routed experts of one layer call.

        Args:
            hidden: [T, H] floating point, on the device of the model's dense part.
            topk_ids: [T, K] integer expert ids.
            topk_weights: [T, K] floating point routing weights; a weight belongs to the id at its own place.
            sent: what is on its way to the host already; without an accelerator nothing is.

        Returns:
            [T, H] sum over each token's experts, dtype and device of `hidden`.
        """
        if hidden.shape[0] == 0:
            return torch.zeros_like(hidden)
        if self._whole_calls and self.recorder is None and self.timeline is None:
            return self._whole(layer, hidden, topk_ids, topk_weights)
        while True:
            try:
                return self._run(layer, hidden, topk_ids, topk_weights, sent)
            except torch.OutOfMemoryError as error:
                self._shrink(error)

    def _run(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        sent: Sent | None,
    ) -> torch.Tensor:
        now_us = self.clock.now_us()
        seen = self._read(layer, hidden, topk_ids, topk_weights, sent)
        ids_np = seen.ids.numpy()
        if self.accelerator is not None:
            self.controller.learn(layer, ids_np, seen.weights.numpy(), seen.scores)
        step = self.controller.begin(layer, loads(ids_np), len(ids_np), now_us)
        submitted = bool(step.plan.cpu)
        try:
            if submitted:
                self.cpu.submit(layer, seen.hidden, seen.ids, seen.weights, step.plan.cpu)
            output = self._accelerate(step, hidden, ids_np, topk_weights)
            self._look_ahead(step, seen, now_us)
        finally:
            # An interrupted call must leave no task behind and no slot leased.
            from_cpu = self.cpu.sync() if submitted else None
            self.controller.finish(step)
        if from_cpu is not None:
            from_cpu = self._place(from_cpu.to(hidden.dtype), hidden.device)
            output = from_cpu if output is None else output + from_cpu
        assert output is not None, "a plan covers every routed expert"
        self._pass_time(step, now_us)
        return output

    def _whole(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """The CPU computes everything and nobody watches: there is nothing to plan, and planning would cost a third."""
        now_us = self.clock.now_us()
        output = self.cpu.compute(layer, hidden, topk_ids, topk_weights)  # type: ignore[attr-defined]
        counters = self.controller.counters
        tokens, chosen = topk_ids.shape
        if tokens > 1:
            chosen = len(np.unique(topk_ids.numpy()))
        counters.calls += 1
        counters.tokens += tokens
        counters.activations += chosen
        counters.experts_cpu += chosen
        counters.moe_us += self.clock.now_us() - now_us
        return output

    def close(self) -> None:
        """Give back threads and device memory."""
        self.cpu.close()
        if self.accelerator is not None:
            self.accelerator.close()

    def _read(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        sent: Sent | None,
    ) -> HostView:
        """Bring over the routing decision and what else the host needs; the one host synchronisation of a call.

        Predictions are computed behind it, so that it does not wait for them.
        """
        coming = None
        if sent is not None:
            needed, coming = sent.needed(), sent.predicted()
            tensors = needed.wait()
        else:
            asked = self.accelerator is not None or self.recorder is not None
            shown = self.routers[layer].scores() if asked else None
            tensors = [hidden, topk_ids, topk_weights, *(() if shown is None else (shown,))]
            if self.accelerator is not None:
                needed = self.accelerator.bring(tensors)
                later = self.later_routers(layer)
                coming = self.accelerator.bring([router.predict(hidden) for router in later]) if later else None
                tensors = needed.wait()
            else:
                tensors = [tensor.to("cpu") for tensor in tensors]
        states, ids, weights, *scores = tensors
        return HostView(
            states,
            ids.to(torch.int64),
            weights.to(torch.float32),
            scores[0].to(torch.float32).numpy() if scores else None,
            coming,
        )

    def _place(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor on the device; from the CPU to the accelerator without stopping the host."""
        if self.accelerator is not None and tensor.device.type == "cpu" and device == self.accelerator.device:
            return self.accelerator.place(tensor)
        return tensor.to(device)

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        """Give a part of the cache back to the rest of the model and go on; the interrupted call is run again.

        Raises:
            torch.OutOfMemoryError, BudgetError: there is no cache left to give.
        """
        before = sum(self.controller.pool.quotas)
        if self.accelerator is None or not before:
            raise error
        while True:
            moves = self.controller.shrink(SHRINK_TO)
            try:
                self.accelerator.allocate(self.controller.pool.slots, self.layers)
                break
            except BudgetError:  # what was given back may lie in pieces
                if not sum(self.controller.pool.quotas):
                    raise
        self._onload(moves)
        left = sum(self.controller.pool.quotas)
        log.warning(
            "out of memory on %s: the cache shrinks from %d to %d experts", self.accelerator.device, before, left
        )

    def _accelerate(
        self, step: Step, hidden: torch.Tensor, ids: NDArray[np.int64], topk_weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Run the accelerator's share in waves: what is there, what is in flight, then demand loads as they come."""
        if self.accelerator is None or not step.plan.accelerator:
            return None
        for expert, slot in self.controller.stale(step):
            if self.accelerator.cancel(slot):
                self.controller.withdraw(step.layer, expert)
        present = self._present_waves(step, self.controller.pool.cached[step.layer])
        batches = [step.moves[first : first + self.wave] for first in range(0, len(step.moves), self.wave)]
        waves = [*present, *({move.expert: move.slot for move in batch} for batch in batches)]
        unsent = iter(batches)
        self._onload(next(unsent, ()))
        device = self.accelerator.device
        states, weights = self._place(hidden, device), self._place(topk_weights, device)
        slot_ids = self.accelerator.place(self._slot_ids(waves, ids))
        output: torch.Tensor | None = None
        for index, wave in enumerate(waves):
            if index >= len(present):
                # Send a wave before computing the one before it, so that link and accelerator overlap.
                self._onload(next(unsent, ()))
            part = self.accelerator.compute(tuple(wave.values()), states, slot_ids[index], weights)
            output = part if output is None else output + part
        assert output is not None
        return output.to(hidden.device, hidden.dtype)

    @staticmethod
    def _present_waves(step: Step, slots: dict[int, int]) -> list[dict[int, int]]:
        """Expert -> slot of the resident experts, then of those in flight, leaving out empty waves."""
        demanded = {move.expert for move in step.moves}
        in_flight = {routed.expert for routed in step.routed if routed.ready_us > 0}
        present = [expert for expert in step.plan.accelerator if expert not in demanded]
        waves = (
            {expert: slots[expert] for expert in present if expert not in in_flight},
            {expert: slots[expert] for expert in present if expert in in_flight},
        )
        return [wave for wave in waves if wave]

    def _slot_ids(self, waves: Sequence[dict[int, int]], ids: NDArray[np.int64]) -> torch.Tensor:
        """[W, T, K] int64: the slot of each routed expert in each wave, -1 where it is not computed there."""
        if len(ids) == 1:
            row = ids[0].tolist()
            return torch.from_numpy(np.array([[[wave.get(expert, -1) for expert in row]] for wave in waves]))
        table = np.full((len(waves), self.layers[0].spec.experts), -1, dtype=np.int64)
        for line, wave in zip(table, waves, strict=True):
            line[list(wave)] = list(wave.values())
        return torch.from_numpy(table[:, ids])

    def _onload(self, moves: Sequence[Move], ahead: bool = False) -> None:
        assert self.accelerator is not None
        for move in moves:
            self.accelerator.onload(move.slot, self.layers[move.layer], move.expert, ahead)

    def _look_ahead(self, step: Step, seen: HostView, now_us: float) -> None:
        """Use the idle link for what the next layers are predicted to need, while CPU and accelerator compute."""
        found = seen.predicted(wait=self.recorder is not None)
        if self.recorder is not None:
            # Copies: what a CUDA graph sends lies in the same memory at the next token.
            scores = None if seen.scores is None else seen.scores.copy()
            ids, weights = seen.ids.numpy().copy(), seen.weights.numpy().copy()
            self.recorder(CallRecord(step.layer, ids, weights, scores, tuple(one.copy() for one in found)))
        if self.accelerator is None:
            return
        predicted = [(step.layer + distance, loads(ids)) for distance, ids in enumerate(found, 1)]
        moves = self.controller.look_ahead(step, predicted, now_us)
        self._onload(moves, ahead=True)
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
