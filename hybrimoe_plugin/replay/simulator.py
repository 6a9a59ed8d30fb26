"""Drive the engine's own controller over a trace and a machine profile; every time is simulated."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrimoe_plugin.policy.controller import Controller, loads
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.replay.trace import Trace


@dataclass
class Outcome:
    """What one system did on one trace."""

    prefill_us: list[float] = field(default_factory=list)
    """Simulated MoE time of each pass with more than one token, gaps between layers included."""
    decode_us: list[float] = field(default_factory=list)
    """The same for passes of one token."""
    counters: Counters = field(default_factory=Counters)
    decode_counters: Counters = field(default_factory=Counters)
    """Counts of the decode passes alone."""


def replay(trace: Trace, controller: Controller) -> Outcome:
    """Run a trace through a controller whose pool is empty; mirrors `Engine.run` with a simulated clock."""
    outcome = Outcome()
    controller.warm_start()
    now_us = 0.0
    for group in trace.passes():
        before, started = controller.counters.snapshot(), now_us
        for call in group:
            controller.learn(call.layer, call.ids, call.weights, call.scores)
            step = controller.begin(call.layer, loads(call.ids), len(call.ids), now_us)
            predicted = [(call.layer + d, loads(ids)) for d, ids in enumerate(call.predicted, 1)]
            controller.look_ahead(step, predicted, now_us)
            controller.finish(step)
            controller.counters.moe_us += step.plan.makespan_us
            now_us += step.plan.makespan_us + controller.costs.between_layers_us
        if len(group[0].ids) > 1:
            outcome.prefill_us.append(now_us - started)
        else:
            outcome.decode_us.append(now_us - started)
            outcome.decode_counters = outcome.decode_counters.plus(controller.counters.since(before))
    outcome.counters = controller.counters.snapshot()
    return outcome
