"""The question about the host's part in decoding: what it counts, what it times, what it prints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.host_path import order, paths, question, trace
from eval.host_path.driver import Driver, DriverCall
from eval.host_path.measure import (
    DECIDE,
    TOKEN,
    WHOLE,
    Runner,
    decisions,
    few_rows,
    token_means,
    whole_calls,
)
from eval.host_path.reads import Reads
from eval.host_path.routing import CASES, HITS, SETTLING, Case
from eval.host_path.stopwatch import Stopwatch
from eval.host_path.subject import Subject, subject
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.device.streams import COMPUTE, LINK, REPACK, CudaStreams
from hybrimoe_plugin.policy.step import Step

LAYERS, EXPERTS = 3, 32


@pytest.fixture(scope="module", params=paths.PATHS)
def made(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """A model on each path."""
    with subject(LAYERS, EXPERTS, **paths.settings(request.param)) as found:
        yield found


def waits(made: Subject) -> bool:
    return made.model.hybrimoe.settings[0].__dict__.get("host_path", paths.WAIT) == paths.WAIT


def on_device() -> torch.Tensor:
    return torch.ones(2, 3, device="meta")


STOPPING: dict[str, Callable[[Driver], Any]] = {
    "item": lambda _driver: on_device().sum().item(),
    "bool": lambda _driver: bool((on_device() > 0).all()),
    "tolist": lambda _driver: on_device()[0, 0].tolist(),
    "nonzero": lambda _driver: on_device().nonzero(),
    "cpu": lambda _driver: on_device().cpu(),
    "copy to the host": lambda _driver: torch.zeros(2, 3).copy_(on_device()),
    "copy to the device": lambda _driver: torch.zeros(2, 3).to("meta"),
    "equal": lambda _driver: torch.equal(on_device(), on_device()),
    "synchronize": lambda _driver: torch.cuda.synchronize(),
    "empty_cache": lambda _driver: torch.cuda.empty_cache(),
    "event": lambda _driver: torch.cuda.Event().synchronize(),
    "stream": lambda _driver: torch.cuda.Stream().synchronize(),
}
GOING_ON: dict[str, Callable[[Driver], Any]] = {
    "copy to the host": lambda _driver: torch.zeros(2, 3).copy_(on_device(), non_blocking=True),
    "copy to the device": lambda _driver: torch.zeros(2, 3).to("meta", non_blocking=True),
    "on the device": lambda _driver: on_device() * 2 + on_device(),
    "on the host": lambda _driver: torch.ones(3).sum().item(),
    "record": lambda driver: torch.cuda.Event().record(driver.main),  # type: ignore[arg-type]
    "one question": lambda _driver: torch.cuda.Event().query(),
}


def recorded(call: Callable[[Driver], Any]) -> list[DriverCall]:
    driver = Driver()
    with driver.installed(), Reads(driver), driver.recording() as calls:
        call(driver)
    return calls


@pytest.mark.parametrize("name", STOPPING)
def test_what_stops_the_host_is_counted(name: str) -> None:
    assert len(trace.stops(recorded(STOPPING[name]))) == 1


@pytest.mark.parametrize("name", GOING_ON)
def test_what_does_not_is_not(name: str) -> None:
    assert trace.stops(recorded(GOING_ON[name])) == []


def test_asking_an_event_until_it_is_reached_stops_the_host() -> None:
    def ask(driver: Driver) -> None:
        driver.reached = False
        one, other = torch.cuda.Event(), torch.cuda.Event()
        one.query()
        other.query()
        one.query()
        one.query()

    assert len(trace.stops(recorded(ask))) == 1


def test_asking_twice_whether_a_reached_event_is_reached_does_not() -> None:
    def ask(_driver: Driver) -> None:
        event = torch.cuda.Event()
        assert event.query() and event.query()

    assert trace.stops(recorded(ask)) == []


def test_what_comes_before_an_event_that_was_waited_for_is_reached_however_late_the_device_is() -> (
    None
):
    driver = Driver()
    driver.reached = False
    with driver.installed(), driver.recording():
        before, waited, behind, other = (torch.cuda.Event() for _ in range(4))
        before.record()
        other.record(torch.cuda.Stream())
        waited.record()
        behind.record()
        assert not before.query()
        waited.synchronize()
        assert [event.query() for event in (before, waited, behind, other)] == [
            *(True, True),
            *(False, False),
        ]


def test_outside_of_a_recorded_token_reads_of_the_device_fail() -> None:
    """So that no timed call can contain one."""
    for read in (lambda: on_device().sum().item(), lambda: on_device().cpu()):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            read()


@pytest.mark.parametrize("late", [False, True])
def test_a_token_waits_for_every_layer_or_for_none(
    late: bool, made: Subject, tmp_path: Path
) -> None:
    whole_calls(Runner(made), HITS, SETTLING)
    token = trace.hit_token(made, late)
    stopping = trace.stops(token.forward)
    assert [call.name for call in stopping] == ["cudaEventSynchronize"] * LAYERS * waits(made)
    assert token.round_trips == len(stopping)
    assert [call.name for call in trace.stops(token.sampling)] == ["_local_scalar_dense"]
    launches = [call for call in token.forward if call.name == "cudaGraphLaunch"]
    graphs = 3 if waits(made) else 4
    assert len(launches) == graphs * LAYERS - 1, "the last layer has no look-ahead"
    path = tmp_path / "a folder" / "trace.json"
    trace.write(path, token)
    events = [event for event in json.loads(path.read_text()) if event["ph"] == "X"]
    assert len(events) == len(token.forward) + len(token.sampling)
    marked = [event for event in events if event["cat"] == "stops the host"]
    assert len(marked) == len(stopping)
    assert all(event["args"]["part"] == "forward" for event in marked)


PURE = [case for case in CASES if case.every == 1]


@pytest.mark.parametrize("case", PURE, ids=[case.name for case in PURE])
def test_layer_calls_are_what_their_case_wants(case: Case, made: Subject) -> None:
    runner = Runner(made)
    counters = made.engine.controller.counters
    whole_calls(runner, case, SETTLING)
    before = counters.snapshot()
    times = whole_calls(runner, case, 5)
    calls = 5 * LAYERS - times.others
    assert calls > 4 * LAYERS
    assert len(times.parts[WHOLE]) == calls
    if not times.others:
        assert counters.experts_cpu - before.experts_cpu == case.on_cpu * calls
        assert counters.demand_loads - before.demand_loads == case.loads * calls
    decided = decisions(made, runner, case, 3).parts
    if case.misses or waits(made):
        assert decided[DECIDE] and all(us > 0 for us in decided[DECIDE])
    else:
        assert not decided, "the host has nothing to decide"


def test_a_part_of_the_layer_calls_can_miss(made: Subject) -> None:
    (case,) = (case for case in CASES if case.every > 1)
    counters = made.engine.controller.counters
    before = counters.snapshot()
    times = token_means(Runner(made), case, 40)
    calls = 40 * LAYERS
    share = (counters.experts_cpu - before.experts_cpu) / calls
    assert 0.3 / case.every < share < 2 / case.every
    assert len(times.parts[TOKEN]) == 40 and min(times.parts[TOKEN]) > 0


def test_a_slow_plan_shows_in_both_times(made: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(made)
    case = PURE[1]
    whole_calls(runner, case, SETTLING)
    begin = made.engine.controller.begin

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.002)
        return begin(*args, **kwargs)

    monkeypatch.setattr(made.engine.controller, "begin", slow)
    assert min(whole_calls(runner, case, 2).parts[WHOLE]) > 2000
    assert min(decisions(made, runner, case, 2).parts[DECIDE]) > 2000


def test_a_stopwatch_times_what_it_watches_and_leaves_it_as_it_was() -> None:
    class Owner:
        def long(self) -> int:
            time.sleep(0.002)
            return self.short()

        def short(self) -> int:
            return 3

    owner = Owner()
    watch = Stopwatch()
    with watch.on({"long": [(owner, "long")], "short": [(owner, "short")]}):
        assert owner.long() == 3
        found = watch.take()
        assert watch.take() == {"long": 0, "short": 0}
    assert found["long"] > 2000 > found["short"]
    assert owner.__dict__ == {}
    assert 0 < watch.own_us < 100


@pytest.mark.parametrize("path", paths.PATHS)
def test_events_order_all_uses_of_slots(path: str) -> None:
    assert order.checked(path) > 100


@pytest.mark.parametrize("missing", [LINK, REPACK, COMPUTE])
def test_every_edge_between_streams_is_needed(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without those that one queue waits for, some use of a slot may come too early.

    A load into a slot that the same call has used is rare: it came after 2 to 10 tokens.
    """
    wait = CudaStreams.wait

    def waits(self: CudaStreams, queue: str, event: Any) -> None:
        if queue != missing:
            wait(self, queue, event)

    monkeypatch.setattr(CudaStreams, "wait", waits)
    with pytest.raises(RuntimeError, match="nothing orders"):
        order.checked(paths.WAIT, tokens=40)


def test_what_graphs_read_by_themselves_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotAccelerator, "used_layer", lambda self, weights: None)
    with pytest.raises(RuntimeError, match="nothing orders"):
        order.checked(paths.CHAIN)


@pytest.mark.slow
def test_the_question_prints_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "EXPERTS", (EXPERTS,))
    monkeypatch.setattr(question, "JUDGED", (EXPERTS,))
    path = tmp_path / "trace.json"
    found = question.main(
        ["--quick", "--layers", "3", "--out", str(tmp_path), "--trace", str(path)]
    )
    assert found["host_round_trips_per_hit_token"] == 0
    assert found["wait_host_round_trips_per_hit_token"] == LAYERS
    path = path.with_stem("trace_chain")
    assert found["onload_us"] > 0
    assert 0 < found["decide_us_p50"] < found["layer_us_p50"]
    assert 0 < found["decide_us_miss_p50"] < found["layer_us_p50"]
    assert {item.name for item in tmp_path.iterdir()} >= {"host_path.csv", path.name}


def test_calls_of_a_few_rows_are_timed_as_such(
    made: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Step] = []
    finish = made.engine.controller.finish

    def noted(step: Step) -> None:
        steps.append(step)
        finish(step)

    monkeypatch.setattr(made.engine.controller, "finish", noted)
    before = made.engine.controller.counters.snapshot()
    found = few_rows(made, 4, 2)
    counts = made.engine.controller.counters
    assert len(found) == 2 * LAYERS and min(found) > 0
    calls = counts.calls - before.calls
    assert counts.tokens - before.tokens == 4 * calls
    assert counts.demand_loads > before.demand_loads
    assert len(steps) == calls and all(step.few for step in steps)
