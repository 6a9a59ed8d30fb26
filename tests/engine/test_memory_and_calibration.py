"""Sizing refuses before loading; profiles are measured once and rebuilt when damaged."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny_experts
import torch

from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.config import Settings, parse_bytes
from hybrimoe_plugin.device import noise
from hybrimoe_plugin.device.memory import check_host, free_host_bytes, huge_pages, human
from hybrimoe_plugin.engine.profile_store import ensure_profile, profile_path
from hybrimoe_plugin.engine.sizing import STAGING_SLOTS, cache_quotas
from hybrimoe_plugin.engine.threads import thread_candidates
from hybrimoe_plugin.errors import BudgetError, ConfigError
from hybrimoe_plugin.policy.profile import MachineProfile

LAYERS = [1000] * 4


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_memory_from_huge_pages_is_private_and_asks_for_them() -> None:
    memory = huge_pages(8 << 20)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        low, high, permissions = re.split(r"[- ]", mapping, maxsplit=2)
        if int(low, 16) <= address < int(high, 16):
            assert permissions[3] == "p"
            assert re.search(r"^VmFlags:.* hg", mapping, re.MULTILINE)
            return
    pytest.fail("the memory is not mapped")


def test_quotas_follow_ratio_bytes_or_what_is_free() -> None:
    assert cache_quotas(Settings(cache_ratio=0.25), 8, LAYERS, None) == [2] * 4
    assert cache_quotas(Settings(cache_bytes=10_000), 8, LAYERS, None) == [2, 2, 1, 1]
    assert cache_quotas(Settings(), 8, LAYERS, 10_000) == [2, 1, 1, 1]
    assert cache_quotas(Settings(), 8, LAYERS, 10**9) == [8] * 4
    assert cache_quotas(Settings(cache_ratio=0.0), 8, LAYERS, 5_000) == [0] * 4


@pytest.mark.parametrize(
    ("settings", "free"),
    [
        (Settings(cache_ratio=1.0), 20_000),
        (Settings(cache_bytes=3_000), None),
        (Settings(cache_bytes=30_000), 20_000),
    ],
)
def test_budgets_that_do_not_fit_are_refused(settings: Settings, free: int | None) -> None:
    with pytest.raises(BudgetError, match=f"{STAGING_SLOTS} staging slots"):
        cache_quotas(settings, 8, LAYERS, free)
    with pytest.raises(BudgetError):
        cache_quotas(Settings(), 8, LAYERS, 1_000)


def test_host_memory() -> None:
    check_host(1, "a byte")
    assert free_host_bytes() > 0
    with pytest.raises(BudgetError, match=r"the weights need 1\.0 TiB of memory"):
        check_host(1 << 40, "the weights", 1 << 30)
    assert [human(size) for size in (5, 2048, 3 << 30)] == ["5 B", "2.0 KiB", "3.0 GiB"]


GIB = 1 << 30
V2 = ("memory.max", "memory.current", "memory.stat")
V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")
CACHED = "anon 7\ninactive_file {0}\nactive_file {1}\nfile_dirty {2}\n"
CACHED_V1 = "inactive_file 1\ntotal_inactive_file {0}\ntotal_active_file {1}\ntotal_dirty {2}\n"


@pytest.mark.parametrize(("names", "text"), [(V2, CACHED), (V1, CACHED_V1)], ids=["v2", "v1"])
def test_a_mapped_file_does_not_fill_a_container(
    names: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    assert free_host_bytes(tmp_path) == 100 * GIB, "no limit is known"

    def say(*values: object) -> None:
        for name, value in zip(names, values, strict=True):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"{value}\n")

    say(32 * GIB, 30 * GIB, text.format(15 * GIB, 5 * GIB, GIB))
    assert free_host_bytes(tmp_path) == (2 + 15 + 5 - 1) * GIB
    say(200 * GIB, 30 * GIB, text.format(0, 0, 0))
    assert free_host_bytes(tmp_path) == 100 * GIB, "the machine has no more"
    say("max" if names is V2 else 9223372036854771712, 30 * GIB, text.format(0, 0, 0))
    assert free_host_bytes(tmp_path) == 100 * GIB
    say(32 * GIB, 33 * GIB, "")
    assert free_host_bytes(tmp_path) == 0
    say(32 * GIB, 30 * GIB, "")
    (tmp_path / names[2]).unlink()
    assert free_host_bytes(tmp_path) == 2 * GIB, "a limit counts where nothing else is told"


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 2**30), ("500 MB", 5 * 10**8), ("2k", 2000), ("1.5KiB", 1536), (7, 7)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["lots", "-1", "", "1 TiBB", True])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize(
    "values",
    [
        {"scheduler": "magic"},
        {"cache_ratio": 1.5},
        {"cache_ratio": float("nan")},
        {"cache_ratio": "a"},
        {"look_ahead": 0},
        {"look_ahead": True},
        {"mrs_alpha": -0.1},
        {"cpu_threads": 0},
        {"cache_ratio": 0.5, "cache_bytes": 5},
        {"colour": "red"},
    ],
)
def test_settings_name_what_is_wrong(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Settings.of(values)


def test_profile_is_measured_once_and_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HYBRIMOE_PROFILES", str(tmp_path))
    weights = tiny_experts.layer()
    accelerator = make_accelerator("emulated", torch.device("cpu"))
    made = []

    def make_cpu(threads: int) -> TorchExperts:
        made.append(threads)
        return TorchExperts(keep=True)

    def ensure() -> object:
        return ensure_profile(weights, "torch", make_cpu, accelerator, progress=False)

    first = ensure()
    assert made == thread_candidates()
    assert ensure() == first
    assert len(made) == len(thread_candidates())
    path = profile_path(weights.spec, "torch", "emulated", None)
    path.write_text("{")
    ensure()
    assert "measuring again" in caplog.text
    assert len(made) == 2 * len(thread_candidates())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "other experts": lambda profile: profile["spec"].update(hidden=profile["spec"]["hidden"] * 2),
    "more threads than cores": lambda profile: profile["cpu"].update(threads=3000),
    "times beyond all bounds": lambda profile: profile["cpu"].update(
        us=[1e308] * len(profile["cpu"]["us"])
    ),
    "no time at all": lambda profile: profile["cpu"].update(us=[]),
    "an accelerator that is not there": lambda profile: profile.update(
        accelerator=profile["cpu"], link={"gbps": 1.0, "latency_us": 1.0}
    ),
}


@pytest.mark.parametrize("how", sorted(HOSTILE))
def test_a_stored_profile_that_was_not_measured_here_is_measured_again(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HYBRIMOE_PROFILES", str(tmp_path))
    weights = tiny_experts.layer()

    def ensure() -> MachineProfile:
        return ensure_profile(
            weights, "torch", lambda threads: TorchExperts(keep=True), None, progress=False
        )

    ensure()
    path = profile_path(weights.spec, "torch", "none", None)
    changed = json.loads(path.read_text())
    HOSTILE[how](changed)
    path.write_text(json.dumps(changed))
    fresh = ensure()
    assert "measuring again" in caplog.text
    assert fresh.spec == weights.spec
    assert fresh.accelerator is None
    assert (fresh.cpu.threads or 1) in thread_candidates()
    assert ensure() == fresh


def test_times_of_a_busy_machine_are_for_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HYBRIMOE_PROFILES", str(tmp_path))
    monkeypatch.delenv("HYBRIMOE_BUSY", raising=False)
    weights = tiny_experts.layer()
    waited = iter(
        range(0, 10_000, 1_000)
    )  # seconds that threads waited: far more than the measurement takes
    monkeypatch.setattr(noise, "_waited_seconds", lambda: float(next(waited)))

    def ensure(refresh: bool = False) -> MachineProfile:
        return ensure_profile(
            weights,
            "torch",
            lambda threads: TorchExperts(keep=True),
            None,
            progress=False,
            refresh=refresh,
        )

    assert ensure().cpu.us[0] > 0
    assert caplog.text == "", "the CPU computes alone"
    ensure(refresh=True)
    assert "other programs used the processor" in caplog.text
    assert "measured again at the next start" in caplog.text
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("HYBRIMOE_BUSY", "keep")
    kept = ensure()
    assert ensure() == kept
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.delenv("HYBRIMOE_BUSY")
    profile_path(weights.spec, "torch", "none", None).unlink()
    monkeypatch.setattr(noise, "_waited_seconds", lambda: 0.0)
    monkeypatch.setattr(noise, "MOST_SPREAD", float("inf"))
    kept = ensure()
    assert ensure() == kept, "a quiet machine's times stay"


def test_repetitions_that_differ_are_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_waited_seconds", lambda: None)
    steady = [100.0, 103.0, 99.0, 101.0, 100.0]
    outlier = [100.0] * 4 + [9000.0]
    erratic = [100.0, 900.0] * 5
    quiet = noise.Noise()
    assert [quiet.median(times) for times in (steady, outlier)] == [100.0, 100.0]
    assert quiet.verdict() == ""
    busy = noise.Noise()
    for times in (steady, erratic, erratic):
        busy.median(times)
    assert "repetitions of 2 of 3 calls differ" in busy.verdict()


def test_linux_counts_how_long_threads_wait() -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("no /proc on this system")
    before = noise._waited_seconds()
    if before is None:
        pytest.skip("this kernel keeps no such count")
    assert before >= 0


def test_another_shape_has_another_profile() -> None:
    small = tiny_experts.layer().spec
    large = tiny_experts.layer(hidden=128).spec
    assert profile_path(small, "kt", "none", None) != profile_path(large, "kt", "none", None)


def test_a_profile_that_cannot_be_kept_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRIMOE_PROFILES", str(tmp_path / "file" / "below"))
    weights = tiny_experts.layer()
    profile = ensure_profile(
        weights, "torch", lambda threads: TorchExperts(keep=True), None, threads=1, progress=False
    )
    assert profile.cpu.us[0] > 0
    assert "cannot be written" in caplog.text
