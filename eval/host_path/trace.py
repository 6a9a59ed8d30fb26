"""One token in which every layer hits, as a recorded trace of what the driver was asked for."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.host_path.driver import DriverCall
from eval.host_path.reads import Reads
from eval.host_path.routing import HITS, Script
from eval.host_path.subject import Subject

QUERIES = ("cudaEventQuery", "cudaStreamQuery")
LOOP = "asks again and again"
TRIES = 5


class HitToken(NamedTuple):
    """The trace of a token."""

    forward: list[DriverCall]
    """Of the model's forward pass."""
    sampling: list[DriverCall]
    """Of choosing the next token from its logits, which the host must read."""

    @property
    def round_trips(self) -> int:
        """Calls of the forward pass that make the host wait for the device."""
        return len(stops(self.forward))


def hit_token(subject: Subject, late: bool = False) -> HitToken:
    """Record a token; tried again where prefetches have moved an expert meanwhile.

    Args:
        late: no event is reached by the time that the host asks.

    Raises:
        RuntimeError: no token hit in every layer.
    """
    script = Script(subject)
    counters = subject.engine.controller.counters
    for _ in range(TRIES):
        script.begin(HITS)
        for layer in range(len(subject.layers)):
            arrive = functools.partial(script.arrive, layer)
            subject.on_routed(layer, arrive)
        before = counters.snapshot()
        subject.driver.reached = not late
        with Reads(subject.driver), subject.driver.recording() as calls:
            logits = subject.step()
            forward = list(calls)
            int(logits[0, -1].argmax())
        subject.driver.reached = True
        for layer in range(len(subject.layers)):
            subject.on_routed(layer, None)
        subject.rewind()
        asked = counters.activations - before.activations
        hits = counters.cache_hits - before.cache_hits
        loaded = counters.demand_loads - before.demand_loads
        if asked == hits and not loaded:
            return HitToken(forward, calls[len(forward) :])
    raise RuntimeError(f"none of {TRIES} tokens hit in every layer")


def stops(calls: Sequence[DriverCall]) -> list[DriverCall]:
    """The calls by which the host waits for the device.

    One question whether an event is reached does not wait. Where the answer was no, asking the same
    again, with nothing else done between, does.
    """
    found = []
    last: DriverCall | None = None
    for call in calls:
        if call.stops:
            found.append(call)
        elif call.name in QUERIES and last is not None and _asks_again(call, last):
            found.append(call._replace(stops=LOOP))
        last = call
    return found


def _asks_again(call: DriverCall, last: DriverCall) -> bool:
    same = (call.name, call.stream, call.event) == (last.name, last.stream, last.event)
    return same and not last.reached


def write(path: Path, token: HitToken) -> None:
    """Write the trace for https://ui.perfetto.dev or chrome://tracing."""
    calls = [*token.forward, *token.sampling]
    stopping = {id(call) for call in stops(token.forward)}
    streams = sorted({call.stream for call in calls})
    origin_us = calls[0].at_us
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name or "host"}}
        for tid, name in enumerate(streams)
    ]
    ends = [call.at_us for call in calls[1:]] + [calls[-1].at_us + 1]
    for place, (call, end_us) in enumerate(zip(calls, ends, strict=True)):
        sampling = place >= len(token.forward)
        events.append(
            {
                "ph": "X",
                "name": call.name,
                "cat": "stops the host" if id(call) in stopping else "call",
                "pid": 1,
                "tid": streams.index(call.stream),
                "ts": round(call.at_us - origin_us, 3),
                "dur": round(min(1.0, end_us - call.at_us), 3),
                "args": {"stops": call.stops, "part": "sampling" if sampling else "forward"},
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(events), encoding="utf-8")
