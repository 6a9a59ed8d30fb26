"""How many copies of a layer's row can wait on a device that is as late as it may be."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrimoe_plugin.decode.chain.chain import Chain
from hybrimoe_plugin.decode.chain.slot_table import PLACES


class Device:
    """One queue. It comes as far as the host has seen it come, and no further."""

    def __init__(self) -> None:
        self.queue: deque[Any] = deque()

    def wait_for(self, mark: object) -> None:
        while mark in self.queue:
            self.queue.popleft()


class Link:
    """A layer's part of a chain: what misses and what is chosen otherwise is drawn by lot."""

    def __init__(self, device: Device, rng: random.Random) -> None:
        self.device = device
        self.rng = rng
        self.engine = SimpleNamespace(wants_predictions=False)
        self.expects_hits = self.may_skip_plan = True
        self.most = 0
        self._mark: object = None

    def replays(self, routed: bool) -> None:
        self._mark = object()

    def before(self) -> None:
        self.device.queue.append(self._mark)

    def chosen(self) -> list[int]:
        return [self.rng.randrange(3)]

    def await_routing(self) -> None:
        self.device.wait_for(self._mark)

    def launch(self, graph_break: Any) -> None:
        self.send()

    def send(self) -> None:
        """Every time: no row is as it was."""
        self.device.queue.append(self)
        self.most = max(self.most, self.device.queue.count(self))

    def hits(self, chosen: list[int]) -> bool:
        return self.rng.random() < 0.5

    would_hit = hits

    def note(self, hit: bool) -> None:
        self.expects_hits = self.rng.random() < 0.8

    def note_hit(self, call: Any) -> None:
        pass

    def plan_and_compute(self, call: Any) -> Any:
        self.send()
        return call.graph_break.output


@pytest.mark.parametrize(("count", "most"), [(1, PLACES), (2, PLACES), (3, 2), (5, 2)])
def test_rows_wait_in_as_many_places_as_there_are(count: int, most: int) -> None:
    """The host reads nothing of the device between two tokens."""
    rng = random.Random(0)
    device = Device()
    chain = Chain()
    layers = []
    for _ in range(count):
        link: Any = Link(device, rng)
        layers.append((graphs_of(link), link))
    hidden = torch.zeros(1, 1, 1)
    for _ in range(3000):
        for graphs, link in layers:
            hidden = chain.run(graphs, hidden, link, link is layers[-1][1])
        if rng.random() < 0.5:
            chain.settle()
    assert max(link.most for _, link in layers) == most


def graphs_of(link: Link) -> Any:
    graph_break = SimpleNamespace(
        look_ahead=None, output=torch.zeros(1, 1), memory=SimpleNamespace(chosen=link.chosen)
    )

    def route() -> None:
        link.replays(routed=True)
        link.before()

    return SimpleNamespace(
        hidden=torch.zeros(1, 1, 1),
        output=torch.zeros(1, 1, 1),
        before=link.before,
        route=route,
        after=lambda: None,
        graph_break=graph_break,
    )
