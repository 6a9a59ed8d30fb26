"""What is sampled: the engines of a model, or a target's experts on flash."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.engine import Engine
from hybrimoe_plugin.policy.step import Computed
from hybrimoe_plugin.serve.live.lanes import Lanes
from hybrimoe_plugin.serve.live.places import EngineMap, ExpertStore, store_places
from hybrimoe_plugin.serve.live.rates import Counted, Rates, Window, hits_since

MOST_CALLS = 8192
"""Kept of each engine from one sample to the next; of more, the oldest are left out."""
WINDOW_US = 1e6
EMULATED_WINDOW_US = 1e5
"""Emulated time passes more slowly than the clock on the wall."""


@dataclass(frozen=True)
class Sample:
    """The state of a moment, and what happened since the sample before.

    Attributes:
        places: [L, E] a `Place` for each expert.
        used: [L, E] whether a call has needed it.
        lanes: [3, 100] busy shares of CPU, accelerator and link; None where they are not known.
    """

    places: NDArray[np.uint8]
    used: NDArray[np.bool_]
    lanes: NDArray[np.float64] | None
    rates: Rates


class Source(Protocol):
    """Something to sample. Nothing of it runs while nobody watches.

    Attributes:
        layers: numbers of the decoder layers in the map, ascending.
        experts: the most that any layer has.
        accelerator: `none`, `emulated` or `cuda`.
        flash: whether experts lie on flash.
        window_us: what the lanes show.
    """

    layers: Sequence[int]
    experts: int
    accelerator: str
    flash: bool
    window_us: float

    def begin(self) -> None:
        """Somebody watches from now on."""

    def sample(self) -> Sample:
        """Between `begin` and `end`, by one thread. It does not wait for a running pass."""

    def end(self) -> None:
        """Nobody watches any more."""


class EngineSource:
    """Engines that tell of each call. A pass appends to a list, and the sampler empties it."""

    flash = False

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        self._map = EngineMap(engines)
        self._logs = [deque[Computed](maxlen=MOST_CALLS) for _ in engines]
        self.layers: Sequence[int] = self._map.layers
        self.experts = self._map.experts
        emulated = any(engine.clock.emulated for engine in engines)
        names = [engine.accelerator.name for engine in engines if engine.accelerator is not None]
        self.accelerator = names[0] if names else "none"
        self.window_us = EMULATED_WINDOW_US if emulated else WINDOW_US
        self._begin_anew()

    def begin(self) -> None:
        self._begin_anew()
        for engine, log in zip(self._engines, self._logs, strict=True):
            log.clear()
            engine.watcher = log.append

    def end(self) -> None:
        for engine in self._engines:
            engine.watcher = None

    def sample(self) -> Sample:
        news = [_emptied(log) for log in self._logs]
        for lanes, engine, calls in zip(self._lanes, self._engines, news, strict=True):
            lanes.add(calls, engine.clock.now_us())
        self._window.add(time.monotonic(), self._counted(news[0]))
        return Sample(
            places=self._map.places(moving=any(news)),
            used=self._used(news),
            lanes=np.max([lanes.shares() for lanes in self._lanes], axis=0),
            rates=self._window.rates(),
        )

    def _begin_anew(self) -> None:
        self._window = Window()
        self._lanes = [Lanes(self.window_us) for _ in self._engines]
        self._counters = [engine.controller.counters.snapshot() for engine in self._engines]

    def _used(self, news: Sequence[Sequence[Computed]]) -> NDArray[np.bool_]:
        experts: list[set[int]] = [set() for _ in self.layers]
        for which, calls in enumerate(news):
            for call in calls:
                step = call.step
                row = self._map.rows[which, step.layer]
                experts[row].update(step.plan.cpu, step.plan.accelerator)
        used = np.zeros((len(self.layers), self.experts), np.bool_)
        for row, found in enumerate(experts):
            used[row, list(found)] = True
        return used

    def _counted(self, calls: Sequence[Computed]) -> Counted:
        """Args: calls: of the first engine; a pass calls its first layer once."""
        firsts = [call.step for call in calls if call.step.layer == 0]
        prompts = sum(step.tokens for step in firsts if step.many)
        tokens = sum(step.tokens for step in firsts) - prompts
        now = [engine.controller.counters.snapshot() for engine in self._engines]
        pairs = [hits_since(*pair) for pair in zip(now, self._counters, strict=True)]
        self._counters = now
        hits, needed = map(sum, zip(*pairs, strict=True))
        return Counted(tokens, prompts, hits, needed)


class StoreSource:
    """A target on flash: which experts are in main memory, and which a layer's last call chose."""

    accelerator = "none"
    flash = True
    window_us = WINDOW_US

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self._seen: dict[int, NDArray[np.int64]] = {}
        self._window = Window()
        self.layers: Sequence[int] = store.layers
        self.experts = store.policy.ranks.shape[1]

    def begin(self) -> None:
        self._seen = dict(self._store.chosen)
        self._window = Window()

    def end(self) -> None:
        self._seen = {}

    def sample(self) -> Sample:
        places = store_places(self._store)
        used = np.zeros(places.shape, np.bool_)
        chosen = dict(self._store.chosen)
        for row, ids in chosen.items():
            if ids is not self._seen.get(row):
                used[row, ids.reshape(-1)] = True
        self._seen = chosen
        self._window.add(time.monotonic(), Counted(0, 0, 0, 0))
        return Sample(places, used, None, self._window.rates())


def _emptied(log: deque[Computed]) -> list[Computed]:
    """What is there now; a pass may append meanwhile."""
    return [log.popleft() for _ in range(len(log))]
