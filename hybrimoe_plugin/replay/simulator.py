"""Replay: the engine's controller runs over a trace and machine profile, in simulated time."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrimoe_plugin.policy.controller import Controller, Scored, Step, loads
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.replay.trace import Call, Trace


@dataclass
class Outcome:
    """What one system did on one trace."""

    prefill_us: list[float] = field(default_factory=list)
    """Simulated MoE time of each prompt's pass, gaps between layers included."""
    decode_us: list[float] = field(default_factory=list)
    """The same for the judged decode passes: of one token, of one for each of a few conversations,
    or of a draft's tree.
    """
    counters: Counters = field(default_factory=Counters)
    decode_counters: Counters = field(default_factory=Counters)
    """Counts of the judged decode passes alone."""
    ready: int = 0
    """Activations of these passes whose weights were resident, not just under way, when their call
    began.
    """

    by_distance: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Distance -> prefetches issued and those used, over the whole trace."""

    @property
    def resident_rate(self) -> float:
        """Share of the judged decode activations that were resident when needed."""
        needed = self.decode_counters.activations
        return self.ready / needed if needed else 0.0


def replay(trace: Trace, controller: Controller, skip: int = 0) -> Outcome:
    """Run a trace through a controller, as `Engine.run` does, with a simulated clock.

    Args:
        controller: new, with an empty pool.
        skip: decode passes at the beginning that warm the policies up and are not judged.
    """
    outcome = Outcome()
    controller.warm_start()
    now_us = 0.0
    between_us = controller.costs.between_layers_us
    for group in trace.passes():
        before = controller.counters.snapshot()
        started = now_us
        ready = 0
        for call in group:
            step = _run(call, controller, now_us)
            now_us += step.plan.makespan_us + between_us
            for item in step.routed:
                ready += item.ready_us == 0.0
        accepted = group[0].accepted
        if accepted is not None:
            controller.verified(accepted)
        if is_prompt(group[0]):
            outcome.prefill_us.append(now_us - started)
        elif skip > 0:
            skip -= 1
        else:
            outcome.decode_us.append(now_us - started)
            counted = controller.counters.since(before)
            outcome.decode_counters = outcome.decode_counters.plus(counted)
            outcome.ready += ready
    outcome.counters = controller.counters.snapshot()
    outcome.by_distance = {
        distance: (issued, used)
        for distance, (issued, used) in controller.prefetch_record.by_distance.items()
    }
    return outcome


def is_prompt(call: Call) -> bool:
    """Whether a call's rows are a prompt's tokens.

    Not those of a few conversations or of a draft's tree.
    """
    return len(call.ids) > 1 and not _scored(call).few


def _run(call: Call, controller: Controller, now_us: float) -> Step:
    """One layer call, as `Engine.run` has it."""
    layer, tokens = call.layer, len(call.ids)
    step = controller.begin(layer, loads(call.ids), tokens, now_us, _scored(call))
    predicted = []
    for distance, ids in enumerate(call.predicted, 1):
        predicted.append((layer + distance, loads(ids)))
    controller.look_ahead(step, predicted, now_us)
    controller.finish(step)
    controller.counters.moe_us += step.plan.makespan_us
    return step


def _scored(call: Call) -> Scored:
    return Scored(call.ids, call.weights, call.scores, call.rows)
