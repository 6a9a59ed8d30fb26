"""The GPU check's parent: stages that hang, die or are killed cost only themselves, and no finished
line is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import gpu_check
from eval.cuda import LOAD_EVERY_MISS
from eval.gpu_stages import plan, results, slots
from eval.gpu_stages.place import Place
from eval.gpu_stages.plan import STAGES, Stage
from eval.gpu_stages.where import _union_us
from eval.journal import Journal
from eval.systems import KTRANSFORMERS, OURS
from hybrimoe_plugin.compute.gpu.accelerator import SlotAccelerator
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.device.streams import HostStreams

ROOT = Path(__file__).resolve().parents[2]

SOUND = """
def run(place):
    for number in range(3):
        yield {"case": f"row {number}", "ok": True, "error": 1e-7}
"""
HANGS = """
import time
def run(place):
    yield {"case": "before", "ok": True}
    time.sleep(600)
"""
DIES = """
import os
def run(place):
    yield {"case": "before", "ok": True}
    os.abort()
"""
RAISES = """
def run(place):
    yield {"case": "wrong", "ok": False, "error": 0.5}
    raise ValueError("no such thing")
"""
STARTS_OTHERS = """
import subprocess, sys
def run(place):
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {"case": "other", "ok": True, "pid": left.pid}
"""
COUNTS = """
import os, time
def run(place):
    with open(place.out / "finished.txt", "ab", buffering=0) as told:
        for number in range(40):
            yield {"case": f"row {number}", "pid": os.getpid()}
            told.write(f"NAME row {number}\\n".encode())  # only after the row before has been kept
            time.sleep(0.01)
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a stage of a module's text."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def one(name: str, text: str, limit_s: float = 60, **more: Any) -> Stage:
        (tmp_path / f"made_{name}.py").write_text(text.replace("NAME", name))
        return Stage(name, limit_s, "made up", module=f"made_{name}", **more)

    return one


def check(stages: list[Stage], folder: Path, *flags: str) -> dict[str, Any]:
    return gpu_check.main(
        ["--emulated", "--out", str(folder), "--scratch", str(folder / "s"), *flags], stages
    )


def test_a_stage_that_fails_costs_only_itself(
    tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stages = [make("hangs", HANGS, limit_s=8), make("dies", DIES), make("raises", RAISES)]
    stages += [make("others", STARTS_OTHERS, background=True), make("sound", SOUND, quiet=True)]
    found = check(stages, out)
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == found
    assert found["stages_failed"] == ["dies", "hangs", "raises"]
    assert found["correct"] is False and found["wrong"] == ["raises: wrong"]
    assert found["emulated"] is True
    lines = Journal(out / "results.jsonl").rows()
    kept = {(line["stage"], line["case"]) for line in lines}
    assert {
        ("hangs", "before"),
        ("dies", "before"),
        ("raises", "wrong"),
        ("sound", "row 2"),
    } <= kept
    ends = {line["stage"]: line for line in lines if line["case"] == results.END}
    assert (ends["dies"]["status"], ends["dies"]["detail"][:7]) == ("died", "SIGABRT")
    assert ends["hangs"]["status"] == "timeout" and "killed after" in ends["hangs"]["detail"]
    assert (ends["raises"]["status"], ends["raises"]["detail"]) == (
        "failed",
        "ValueError: no such thing",
    )
    assert "made_hangs.py" in (out / "hangs.log").read_text(), "the log says where it hung"
    rows = [line for line in lines if line["case"] != results.END]
    assert all(
        {"gpu", "driver", "torch", "transformers", "commit", "date"} <= line.keys() for line in rows
    )
    other = next(line for line in lines if line["case"] == "other")
    assert not _runs(other["pid"]), "what a stage leaves running is ended with it"


def test_a_second_run_does_what_is_left_and_a_named_stage_again(
    tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out, stages = tmp_path / "out", [make("raises", RAISES), make("sound", SOUND)]
    check(stages, out)
    make("raises", SOUND)  # mended
    found = check(stages, out)
    assert "already there, and not run again: sound" in capsys.readouterr().err
    assert (found["stages_failed"], found["wrong"]) == ([], []), (
        "a whole run replaces what the stage said before"
    )
    check(stages, out, "--stage", "sound")
    lines = Journal(out / "results.jsonl").rows()
    assert sum(line["stage"] == "sound" and line["case"] == "row 0" for line in lines) == 2


def test_a_stage_that_says_wrong_things_and_ends_well_is_run_again(
    tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = SOUND.replace(
        '"ok": True, "error": 1e-7',
        '"ok": number != 1, "error": float("nan"), "detail": "see [/x]"',
    )
    stages = [make("wrong", wrong, judges=True)]
    for _ in range(2):
        found = check(stages, tmp_path)
        assert (found["correct"], found["wrong"], found["stages_failed"]) == (
            False,
            ["wrong: row 1"],
            [],
        )
        printed = capsys.readouterr()
        assert "already there" not in printed.err
        assert "[/x]" in printed.out, "what stages say is no markup"
    make("wrong", SOUND)
    assert check(stages, tmp_path)["correct"] is True
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["correct"] is True


def test_two_checks_do_not_share_a_machine(
    tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with gpu_check._scratch(tmp_path / "s"):
        found = check([make("sound", SOUND)], tmp_path)
    assert found["stages_missing"] == ["sound"]
    assert "another check is running" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        check([make("sound", SOUND)], tmp_path / "file")


def test_random_kills_lose_no_finished_line(tmp_path: Path, make: Any) -> None:
    """Stages and the check itself are killed at random; what had been kept is there, and the rest
    follows.
    """
    seed = random.randrange(1000)
    print(f"seed {seed}")
    draw, out = random.Random(seed), tmp_path / "out"
    stages = [make("first", COUNTS), make("second", COUNTS)]
    code = (
        "import sys; from eval import gpu_check; from eval.gpu_stages.plan import Stage\n"
        f"stages = [Stage(*fields) for fields in {[tuple(stage) for stage in stages]!r}]\n"
        "gpu_check.main(sys.argv[1:], stages)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "--emulated",
        "--out",
        str(out),
        "--scratch",
        str(tmp_path / "s"),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for round_ in range(3):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        journal = Journal(out / "results.jsonl")
        before = len(journal.rows())
        while process.poll() is None and len(journal.rows()) < before + draw.randint(3, 30):
            time.sleep(0.02)
        rows = [line for line in journal.rows() if "pid" in line]
        victim = process.pid if round_ == 2 else rows[-1]["pid"]
        if draw.random() < 0.5:
            with (out / "results.jsonl").open("ab") as file:
                file.write(b'{"stage": "first", "case": "torn')  # as a full disk leaves it
        _kill(victim)
        if victim == process.pid:
            process.wait(30)
            _wait_until(lambda rows=rows: not _runs(rows[-1]["pid"]))  # no stage outlives the check
        else:
            process.wait(120)
        told = (out / "finished.txt").read_text().split("\n")[:-1]
        kept = {f"{line['stage']} {line['case']}" for line in Journal(out / "results.jsonl").rows()}
        assert set(told) <= kept
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = results.merged(Journal(out / "results.jsonl").rows())
    assert results.done(lines) == {"first", "second"}
    assert [line["case"] for line in results.rows(lines, "second")] == [
        f"row {number}" for number in range(40)
    ]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may just have ended
        os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _wait_until(there: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_times_add_up_to_what_is_promised() -> None:
    usual = [stage for stage in STAGES if not stage.on_demand and not stage.background]
    assert {stage.name for stage in usual if stage.judges} == {"kernels", "slots", "graphs"}
    assert sum(stage.limit_s for stage in usual) <= plan.TOTAL_S
    assert sum(stage.limit_s for stage in usual if stage.core) <= plan.CORE_S
    names = [stage.name for stage in STAGES]
    assert names.index("prepare") < names.index("model")
    assert [stage.core for stage in usual] == sorted(
        (stage.core for stage in usual), reverse=True
    ), "core comes first"


def test_no_time_left_is_said(tmp_path: Path, make: Any) -> None:
    found = check([make("sound", SOUND)], tmp_path, "--limit", "0")
    (line,) = Journal(tmp_path / "results.jsonl").rows()
    assert (line["status"], found["correct"], found["stages_failed"]) == ("skipped", None, [])
    assert found["stages_missing"] == ["sound"]


def test_the_model_s_file_is_written_before_whoever_reads_it() -> None:
    found = gpu_check.wanted(STAGES, STAGES, ["where"], set())
    assert [stage.name for stage in found] == ["prepare", "where"]
    left = gpu_check.wanted(STAGES, STAGES[:4], None, {"prepare", "facts"})
    assert [stage.name for stage in left] == ["kernels", "slots"]


def line(stage: str, case: str, run: str = "1", **more: Any) -> dict[str, Any]:
    return {"stage": stage, "case": case, "gpu": "A", "emulated": False, "run": run, **more}


def end(stage: str, status: str = "ok", run: str = "1", **more: Any) -> dict[str, Any]:
    return line(stage, results.END, run, status=status, **more)


def test_two_runs_that_were_cut_off_make_a_whole_one() -> None:
    lines = [
        line("kernels", "Q4_K", ok=False),
        line("kernels", "Q8_0", ok=True),
        end("kernels", "timeout"),
        line("kernels", "Q4_K", "2", ok=True, error=0.001),
        end("slots", "died"),
        end("slots", "skipped", ""),
    ]
    found = results.merged(lines)
    assert [(item["stage"], item["case"], item.get("ok")) for item in found] == [
        ("kernels", "Q4_K", True),
        ("kernels", "Q8_0", True),
        ("kernels", "end", None),
        ("slots", "end", None),
    ]
    assert results.summary(found, [], [])["stages_failed"] == ["kernels", "slots"], (
        "no time does not undo a failure"
    )
    assert results.headline(found, "kernels") == "2 rows, 2 of 2 right, largest error 1.0e-03"
    whole = results.merged(
        [*lines, line("kernels", "renamed", "3", ok=True), end("kernels", run="3")]
    )
    assert [item["case"] for item in results.rows(whole, "kernels")] == ["renamed"], (
        "a whole run replaces all"
    )


def test_right_is_only_what_every_judging_stage_has_judged() -> None:
    judges = ["kernels", "slots"]
    lines = [
        line("kernels", "a", ok=True),
        end("kernels"),
        line("facts", "b", ok=True),
        end("facts"),
    ]

    def verdict(*more: dict[str, Any]) -> tuple[bool | None, list[str]]:
        found = results.summary(results.merged([*lines, *more]), ["kernels", "slots"], judges)
        return found["correct"], found["stages_missing"]

    assert verdict() == (None, ["slots"])
    assert verdict(end("slots")) == (None, []), "it has judged nothing"
    assert verdict(line("slots", "c", ok=True), end("slots", "died")) == (None, [])
    assert verdict(line("slots", "c", ok=True), end("slots")) == (True, [])
    assert verdict(line("slots", "c", ok=True), end("slots"), line("model", "d", ok=False)) == (
        False,
        [],
    )


def test_cards_and_commits_do_not_mix(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    for found in (
        line("kernels", "a", ok=True, gpu="H200", commit="now"),
        end("kernels", gpu="H200", commit="now"),
        line("slots", "b", ok=True, commit="old"),
        end("slots", commit="old"),
        line("facts", "c", commit="now"),
        end("facts", commit="now"),
    ):
        journal.append(found)
    check = gpu_check.Check(journal, tmp_path, "A", "now")
    assert check.done() == {"facts"}
    assert {item["gpu"] for item in check.lines()} == {"A"}
    assert gpu_check.Check(journal, tmp_path, None, "now").lines() == []
    assert {
        item["gpu"] for item in gpu_check.Check(journal, tmp_path, gpu_check.UNKNOWN, "now").lines()
    } == {"A"}


def test_the_verdict_is_of_what_was_measured() -> None:
    assert (OURS.name, KTRANSFORMERS.name, LOAD_EVERY_MISS.name) == (
        results.OURS,
        *results.RATIO_SYSTEMS.values(),
    )
    times = {
        OURS.name: (4.0, 20.0),
        KTRANSFORMERS.name: (6.0, 30.0),
        LOAD_EVERY_MISS.name: (8.0, 25.0),
    }
    lines = [
        line("model", name, system=name, decode_ms_p50=decode, prefill_ms_p50=prefill)
        for name, (decode, prefill) in times.items()
    ]
    lines += [
        line("bandwidth", "Q4_K", kernel_share=0.4),
        line("bandwidth", "Q8_0", kernel_share=0.7),
    ]
    lines += [line("bandwidth", "small", link_share=0.8, kernel_share="nan")]
    lines += [line("where", "step", host_us_per_layer=120.0)]
    found = results.summary(lines, [], ["kernels"])
    assert found == {
        "correct": None,
        "kernel_share": 0.4,
        "link_share": 0.8,
        "host_us_per_layer": 120.0,
        "decode_tok_s": 250.0,
        "decode_vs_static": 1.5,
        "decode_vs_load_every_miss": 2.0,
        "prefill_vs_static": 1.5,
        "emulated": False,
        "stages_failed": [],
        "stages_missing": [],
        "wrong": [],
    }
    nothing = results.summary([], [], ["kernels"])
    assert all(not nothing[name] for name in found)
    again = [line("model", OURS.name, "2", system=OURS.name, decode_ms_p50=1.0, prefill_ms_p50=1.0)]
    assert results.summary([*lines, *again], [], [])["decode_vs_static"] is None, (
        "the baseline is of another run"
    )


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="there is a card")
def test_a_card_is_what_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.card_name() is None
    for text, name in (
        ("echo 'NVIDIA H100'; echo 'NVIDIA H200'", "NVIDIA H100"),
        ("echo no devices; exit 9", None),
    ):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
        assert gpu_check.card_name() == name
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([path / "nvidia0"]))
    assert gpu_check.card_name() == gpu_check.UNKNOWN, (
        "a card whose driver does not answer is still one"
    )


def test_slots_go_on_alike_whether_or_not_a_prefetch_could_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card prefetches are under way until the device is waited for, so cancelling is a matter
    of luck.
    """

    class Lagging(HostStreams):
        waited = False

        def reached(self, event: Any) -> bool:
            return self.waited

        def synchronize(self) -> None:
            self.waited = True

    def make_lagging(name: str, device: torch.device) -> SlotAccelerator:
        return SlotAccelerator(device, name, TorchKernels(), Lagging())

    monkeypatch.setattr(slots, "make_accelerator", make_lagging)
    rows = list(slots.run(Place(tmp_path, tmp_path, dry=True)))
    assert all(row["ok"] and row["calls"] > 10 for row in rows)


def test_overlapping_work_on_the_device_counts_once() -> None:
    assert _union_us([(0, 10), (5, 12), (20, 21), (20.5, 20.7)]) == 13
    assert _union_us([]) == 0
