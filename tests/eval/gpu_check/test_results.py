"""What counts of the lines that several runs of the GPU check left, and the verdict on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.gpu_bench.baselines import LOAD_EVERY_MISS
from eval.gpu_check import results
from eval.gpu_check.check import UNKNOWN, Check
from eval.policies.systems import KTRANSFORMERS, OURS, PUBLISHED
from eval.reporting.journal import Journal


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
    failed = results.summary(found, [], [])["stages_failed"]
    assert failed == ["kernels", "slots"], "no time does not undo a failure"
    assert results.headline(found, "kernels") == "2 rows, 2 of 2 right, largest error 1.0e-03"
    lines += [line("kernels", "renamed", "3", ok=True), end("kernels", run="3")]
    (row,) = results.rows(results.merged(lines), "kernels")
    assert row["case"] == "renamed", "a whole run replaces all"


def test_right_is_only_what_every_judging_stage_has_judged() -> None:
    judges = ["kernels", "slots"]
    lines = [
        line("kernels", "a", ok=True),
        end("kernels"),
        line("facts", "b", ok=True),
        end("facts"),
    ]

    def verdict(*more: dict[str, Any]) -> tuple[bool | None, list[str]]:
        found = results.summary(results.merged([*lines, *more]), judges, judges)
        return found["correct"], found["stages_missing"]

    right = line("slots", "c", ok=True)
    wrong = line("model", "d", ok=False)
    ended = end("slots")
    died = end("slots", "died")
    assert verdict() == (None, ["slots"])
    assert verdict(ended) == (None, []), "it has judged nothing"
    assert verdict(right, died) == (None, [])
    assert verdict(right, ended) == (True, [])
    assert verdict(right, ended, wrong) == (False, [])


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
    check = Check(journal, tmp_path, "A", "now")
    assert check.done() == {"facts"}
    assert {item["gpu"] for item in check.lines()} == {"A"}
    dry = Check(journal, tmp_path, None, "now")
    assert dry.lines() == []
    unnamed = Check(journal, tmp_path, UNKNOWN, "now")
    assert {item["gpu"] for item in unnamed.lines()} == {"A"}


def test_the_verdict_is_of_what_was_measured() -> None:
    assert OURS.name == results.OURS
    assert KTRANSFORMERS.name == results.STATIC
    assert LOAD_EVERY_MISS.name == results.LOAD_EVERY_MISS
    assert PUBLISHED.name == results.PUBLISHED
    times = {
        OURS.name: (4.0, 20.0),
        KTRANSFORMERS.name: (6.0, 30.0),
        LOAD_EVERY_MISS.name: (8.0, 25.0),
        PUBLISHED.name: (5.0, 25.0),
    }
    lines = [
        line("model", name, system=name, decode_ms_p50=decode, prefill_ms_p50=prefill)
        for name, (decode, prefill) in times.items()
    ]
    lines += [
        line("bandwidth", "Q4_K", kernel_share=0.4),
        line("int8", "Q8_0", kernel_share=0.7, int8_share=0.75),
        line("int8", "Q4_K", kernel_share=0.45, int8_share=0.65),
    ]
    lines += [line("bandwidth", "small", link_share=0.8, kernel_share="nan")]
    lines += [line("where", "step", host_us_per_layer=120.0)]
    lines += [line("bandwidth", name, onload_us_p50=us) for name, us in (("a", 9.0), ("b", 8.0))]
    for name, us, waits in (("auto", 110.0, 0.0), ("wait", 300.0, 12.0)):
        more = {"us_per_layer": us, "waits_per_token": waits, "roofline_share": 11 / us}
        lines += [line("path", f"{name}, all", system=name, cache=1.0, **more)]
        lines += [line("path", f"{name}, half", system=name, cache=0.5, us_per_layer=400.0)]
    found = results.summary(lines, [], ["kernels"])
    assert found == {
        "correct": None,
        "kernel_share": 0.4,
        "int8_share": 0.65,
        "link_share": 0.8,
        "host_us_per_layer": 120.0,
        "decode_tok_s": 250.0,
        "decode_vs_static": 1.5,
        "decode_vs_load_every_miss": 2.0,
        "decode_vs_published": 1.25,
        "prefill_vs_static": 1.5,
        "layer_us": 110.0,
        "layer_roofline_share": 0.1,
        "waits_per_hit_token": 0.0,
        "onload_us": 9.0,
        "emulated": False,
        "stages_failed": [],
        "stages_missing": [],
        "wrong": [],
    }
    nothing = results.summary([], [], ["kernels"])
    assert all(not nothing[name] for name in found)
    times_again = {"decode_ms_p50": 1.0, "prefill_ms_p50": 1.0}
    again = line("model", OURS.name, "2", system=OURS.name, **times_again)
    found = results.summary([*lines, again], [], [])
    assert found["decode_vs_static"] is None, "the baseline is of another run"
