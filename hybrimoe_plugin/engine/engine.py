"""One MoE layer call: plan -> run -> learn -> look ahead.

The engine owns no policy and no kernel. It asks the controller what to do, hands the answer to the
backends and adds up the parts. It is owned by one model; several can live in one process.

A call that is interrupted, or fails, leaves `_unfinished` set. The backends are then cleaned up at
once, or before the next call: no task is left running and no slot claims what it does not hold.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.backends import Accelerator, CPUBackend, WholeCalls
from hybrimoe_plugin.engine.clock import InterLayerTime, SimulatedClock, WallClock
from hybrimoe_plugin.engine.timeline import Timeline
from hybrimoe_plugin.engine.view import (
    CallRecord,
    HostView,
    Router,
    Routing,
    Sent,
    check_rows,
    loads_of_each,
    view_from_accelerator,
    view_on_cpu,
)
from hybrimoe_plugin.engine.waves import Waves
from hybrimoe_plugin.errors import BudgetError
from hybrimoe_plugin.policy.controller import Controller, Move, Step
from hybrimoe_plugin.policy.step import Computed, Rows, whole_call
from hybrimoe_plugin.weights.layer_weights import LayerWeights

log = logging.getLogger(__name__)

SHRINK_TO = 0.75
"""Share of the cached experts that is kept when the device runs out of memory."""


class Engine:
    """Runs the routed experts of one model on one accelerator (or none) and the CPU.

    Args:
        layers: the MoE layers' weights, in order; `run`'s `layer` is the position in this list.
        routers: the same layers' routers.
        look_ahead: how many later layers are predicted for prefetching; 0 for none.
        clock: real time, or simulated where the accelerator is emulated.
        verify: compare the slots with the file's bytes before every call; very slow, for finding
            faults.
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
        verify: bool = False,
    ) -> None:
        self.layers = list(layers)
        self.routers = list(routers)
        self.controller = controller
        self.cpu = cpu
        self.accelerator = accelerator
        self.clock = clock
        self.look_ahead = look_ahead if accelerator is not None else 0
        self.timeline: Timeline | None = None
        self.recorder: Callable[[CallRecord], None] | None = None
        self.watcher: Callable[[Computed], None] | None = None
        """Told of every call; unlike a recorder it changes nothing. Quick, and never raises."""
        self.rows: Rows | None = None
        """Those of the pass that is running, as `HybriMoE.run_rows` was told; None without them."""
        self.verify = verify
        self._unfinished = False
        """Whether a call has begun and not come to its end."""
        self._whole_calls = accelerator is None and isinstance(cpu, WholeCalls)
        self._waves: Waves | None = None
        self._inter_layer: InterLayerTime | None = None
        if accelerator is not None:
            self._waves = Waves(accelerator, self.layers, controller)
            self._waves.onload(controller.warm_start())
            if not clock.emulated:
                self._inter_layer = InterLayerTime()

    @property
    def unplanned(self) -> bool:
        """Whether the CPU computes every call as a whole, and nobody records or draws it."""
        return self._whole_calls and self.recorder is None and self.timeline is None

    def later_routers(self, layer: int) -> list[Router]:
        """The routers whose choices are predicted at this layer, nearest first.

        They end before the first one that cannot be asked.
        """
        first = layer + 1
        ahead = self.routers[first : first + self.look_ahead]
        return list(itertools.takewhile(lambda router: router.predicts, ahead))

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
            topk_weights: [T, K] floating point routing weights; a weight belongs to the id at its
                own place.
            sent: what a CUDA graph copies to the host already; without an accelerator nothing is.

        Returns:
            [T, H] sum over each token's experts, dtype and device of `hidden`.
        """
        if hidden.shape[0] == 0:
            return torch.zeros_like(hidden)
        if self.rows is not None:
            check_rows(self.rows, hidden.shape[0])
        call = Routing(hidden, topk_ids, topk_weights)
        if self.unplanned:
            return self._compute_whole(layer, call)
        while True:
            if self._unfinished:
                self._clean_up()
            try:
                self._unfinished = True
                output = self._compute_planned(layer, call, sent)
                self._unfinished = False
                return output
            except torch.OutOfMemoryError as error:
                self._shrink(error)
            except BaseException:
                # At once, so that nothing runs on; should this fail too, the next call does it.
                with contextlib.suppress(Exception):
                    self._clean_up()
                raise

    @property
    def gives_hits_to_accelerator(self) -> bool:
        """Whether one token's experts, all in slots, are the accelerator's without planning."""
        return not self.verify and self.controller.all_hit_on_accelerator(self.layers[0].spec.top_k)

    @property
    def wants_predictions(self) -> bool:
        """Whether the later routers' choices can change anything, or somebody records them."""
        return self.recorder is not None or self.controller.looks_ahead

    def note_hit(self, layer: int, sent: Sent) -> None:
        """Do the bookkeeping of one token's call that the accelerator has computed by itself.

        All of its experts lay in slots. As after a planned call the cache learns and prefetches.

        Args:
            sent: as for `run`; everything but the predictions must have arrived.
        """
        if self._unfinished:
            self._clean_up()
        try:
            self._unfinished = True
            now_us = self.clock.now_us()
            seen = sent.seen()
            assert seen.chosen is not None, "a graph's call has one token"
            self._note_time_between(layer, 1, now_us)
            controller = self.controller
            # Where everything is cached, nobody asks for ranks.
            looks_ahead = controller.looks_ahead
            scored = seen.routing.scored if looks_ahead else None
            step = controller.hit(layer, seen.chosen, now_us, scored)
            ahead = self._look_ahead(step, seen, now_us, looks_ahead)
            controller.finish(step)
            self._pass_time(step, ahead, now_us)
            self._unfinished = False
        except BaseException:
            with contextlib.suppress(Exception):
                self._clean_up()
            raise

    def verified(self, accepted: NDArray[np.bool_]) -> None:
        """Say which rows [T] of the last pass were accepted; see `Controller.verified`."""
        self.controller.verified(accepted)

    def recover(self) -> None:
        """After a pass that ended early: wait for the device, and trust its slots alone."""
        self._unfinished = True
        self._clean_up()

    def check_integrity(self) -> None:
        """Compare the cache's books, and every byte in its slots, with the file; slow.

        Raises:
            BackendError: they differ.
        """
        if self._waves is not None:
            self._waves.check_integrity()

    def close(self) -> None:
        """Give back threads and device memory."""
        self.cpu.close()
        if self.accelerator is not None:
            self.accelerator.close()

    def _compute_planned(self, layer: int, call: Routing, sent: Sent | None) -> torch.Tensor:
        if self.verify:
            self.check_integrity()
        hidden = call.hidden
        seen = self._read(layer, call, sent)
        now_us = self.clock.now_us()  # the host has waited for the device: the call begins here
        scored = seen.scored(self.rows)
        tokens = len(scored.ids)
        learned = None if self.accelerator is None else scored
        step = self.controller.begin(layer, seen.loads(), tokens, now_us, learned)
        submitted = bool(step.plan.cpu)
        if submitted:
            self.cpu.submit(layer, *seen.for_cpu(), step.plan.cpu)
        output = None
        if self._waves is not None:
            output = self._waves.compute(step, hidden, scored.ids, call.weights, sent)
        self._note_time_between(layer, tokens, now_us)
        ahead = self._look_ahead(step, seen, now_us)
        from_cpu = self.cpu.sync() if submitted else None
        self.controller.finish(step)
        if from_cpu is not None:
            from_cpu = self._to_device(from_cpu.to(hidden.dtype), hidden.device)
            output = from_cpu if output is None else output + from_cpu
        assert output is not None, "a plan covers every routed expert"
        self._pass_time(step, ahead, now_us)
        return output

    def _compute_whole(self, layer: int, call: Routing) -> torch.Tensor:
        """Let the CPU compute everything, where nobody watches.

        There is nothing to plan then, and planning would take a third longer.
        """
        now_us = self.clock.now_us()
        output: torch.Tensor = self.cpu.compute(layer, *call)  # type: ignore[attr-defined]
        self.note_whole(layer, call.ids, now_us, self.clock.now_us() - now_us)
        return output

    def note_whole(self, layer: int, ids: torch.Tensor, start_us: float, spent_us: float) -> None:
        """Count a call of ids [T, K] that the CPU has computed unplanned; tell whoever watches."""
        tokens, chosen = ids.shape
        if tokens > 1:
            chosen = len(set(ids.reshape(-1).tolist()))
        self.controller.counters.count_whole(tokens, chosen, spent_us)
        if (watcher := self.watcher) is not None:  # another thread may take it away
            watcher(whole_call(layer, ids.numpy(), start_us, spent_us))

    def _clean_up(self) -> None:
        """After an unfinished call: stop its tasks, and correct what slots are said to hold."""
        self.cpu.abandon()
        if self._waves is not None:
            self._waves.resynchronise()
        self._unfinished = False

    def _read(self, layer: int, call: Routing, sent: Sent | None) -> HostView:
        """The routing decision on the host; the one host synchronisation of a call."""
        if sent is not None:
            return sent.seen()
        router = self.routers[layer]
        if self.accelerator is None:
            return view_on_cpu(call, router if self.recorder is not None else None)
        return view_from_accelerator(call, router, self.later_routers(layer), self.accelerator)

    def _note_time_between(self, layer: int, tokens: int, now_us: float) -> None:
        """Tell the controller how long layers are apart, before it looks ahead."""
        between = self._inter_layer
        known = None if between is None else between.begin(layer, tokens, now_us)
        if known is not None:
            self.controller.take_between_layers(known)

    def _to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if self._waves is None:
            return tensor.to(device)
        return self._waves.to_device(tensor, device)

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        """Give a part of the cache back to the rest of the model; the failed call is run again.

        Raises:
            torch.OutOfMemoryError, BudgetError: there is no cache left to give.
        """
        before = sum(self.controller.pool.quotas)
        if self.accelerator is None or self._waves is None or not before:
            raise error
        while True:
            moves = self.controller.shrink(SHRINK_TO)
            try:
                self.accelerator.allocate(self.controller.pool.slots, self.layers)
                break
            except BudgetError:  # what was given back may lie in pieces
                if not sum(self.controller.pool.quotas):
                    raise
        self._waves.onload(moves)
        left = sum(self.controller.pool.quotas)
        what = "out of memory on %s: the cache shrinks from %d to %d experts"
        log.warning(what, self.accelerator.device, before, left)

    def _look_ahead(
        self, step: Step, seen: HostView, now_us: float, wanted: bool = False
    ) -> Sequence[Move]:
        """Prefetch what the next layers are predicted to need, while this one is computed.

        Args:
            wanted: whether predictions are known to be wanted; if not, it is asked.
        """
        found: tuple[NDArray[np.int64], ...] = ()
        recorder, layer = self.recorder, step.layer
        if seen.predictions is not None and (wanted or self.wants_predictions):
            found = seen.predictions.arrived(wait=recorder is not None)
        if recorder is not None:
            recorder(seen.record(layer, found))
        if self._waves is None:
            return ()
        predicted = list(enumerate(loads_of_each(found), layer + 1))
        moves = self.controller.look_ahead(step, predicted, now_us)
        self._waves.onload(moves, ahead=True)
        return moves

    def _pass_time(self, step: Step, ahead: Sequence[Move], now_us: float) -> None:
        """Advance the clock over this call and show it."""
        costs, plan = self.controller.costs, step.plan
        if isinstance(self.clock, SimulatedClock):
            spent_us = plan.makespan_us
            self.clock.advance(spent_us + costs.between_layers_us)
        else:
            ended_us = self.clock.now_us()
            spent_us = ended_us - now_us
            if self._inter_layer is not None:
                planned_us = max(ended_us, now_us + plan.makespan_us)
                self._inter_layer.end(step.layer, step.tokens, planned_us)
        self.controller.counters.moe_us += spent_us
        call = Computed(step, ahead, now_us, spent_us)
        if self.timeline is not None:
            self.timeline.layer_call(call, costs, self.clock.emulated)
        if (watcher := self.watcher) is not None:
            watcher(call)
