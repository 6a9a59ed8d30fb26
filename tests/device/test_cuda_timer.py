"""Device time is the device's alone: a fake device and host, each with a clock of its own, say what
is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from hybrimoe_plugin.device import cuda_timer
from hybrimoe_plugin.device.cuda_timer import device_us

CUDA = torch.device("cuda:0")
CYCLES_PER_US = 2000
LAUNCH_US, WORK_US = 40.0, 7.0


class Machine:
    """A host that queues, and a device that does one thing after another; times in us."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.log: list[str] = []
        self.sleeps: list[int] = []

    def queue(self, what: str, busy_us: float) -> float:
        """Gives when it is over."""
        self.log.append(what)
        self.device = max(self.device, self.host) + busy_us
        return self.device

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self.queue("sleep", cycles / CYCLES_PER_US)

    def synchronize(self, _device: object = None) -> None:
        self.host = max(self.host, self.device)

    def launches(self, count: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(count):
                self.host += LAUNCH_US
                self.queue("work", WORK_US)

        return work


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0.0

        def record(self, stream: str) -> None:
            assert stream == "stream"
            self.at = made.queue("event", 0.0)

        def query(self) -> bool:
            return made.host >= self.at

        def synchronize(self) -> None:
            made.host = max(made.host, self.at)

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) / 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made


def test_launches_are_not_counted(machine: Machine) -> None:
    """Three launches take the host 120 us, and the device 21."""
    assert device_us(machine.launches(3), CUDA) == pytest.approx(3 * WORK_US)
    warm = 3 * cuda_timer.WARM_UPS
    assert machine.log[warm:] == ["sleep", "event", *["work"] * 3, "event"] * cuda_timer.REPEATS
    assert device_us(machine.launches(3), CUDA, ahead=False) > 2 * LAUNCH_US, (
        "what the sleep is for"
    )
    assert cuda_timer.cuda_timer(CUDA)(machine.launches(2)) == pytest.approx(2 * WORK_US)


def test_the_device_sleeps_longer_where_the_host_needs_longer(machine: Machine) -> None:
    assert device_us(machine.launches(100), CUDA, repeats=5) == pytest.approx(100 * WORK_US), (
        "4 ms of launches"
    )
    assert sorted(set(machine.sleeps)) == [2_000_000, 4_000_000, 8_000_000, 16_000_000]
    assert len(machine.sleeps) == 3 + 5, "a run that began too early is timed again"


def test_what_no_sleep_covers_is_timed_as_it_is(machine: Machine) -> None:
    def work() -> None:
        machine.host += 10e6
        machine.queue("work", WORK_US)

    assert device_us(work, CUDA, repeats=3) > WORK_US
    assert max(machine.sleeps) == cuda_timer.MOST_SLEEP_CYCLES
