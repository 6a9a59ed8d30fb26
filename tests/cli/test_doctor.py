"""`hybrimoe doctor` always answers, whatever is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrimoe_plugin.cli import doctor
from hybrimoe_plugin.cli.checks import backends, kept
from hybrimoe_plugin.cli.checks.check import Check
from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.cli.serve import libraries
from hybrimoe_plugin.compute.cpu.native import kernels
from hybrimoe_plugin.policy.cache import adaptive


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    for name in ("kt_kernel", "ggml"):
        monkeypatch.setattr(backends, name, lambda name=name: Check(name, True, "faked"))
    return tmp_path


def test_json_has_all_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "installed",
        "backends",
        "classic ktransformers host",
        "memory",
        "kept on disk",
    ]
    torch = next(check for check in found["installed"] if check["name"] == "torch")
    assert torch["ok"] is True


def test_tables_show_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(check.name in out for checks in doctor.examine().values() for check in checks)


def test_the_cache_folder_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(cache) in kept.cache_folder().detail and kept.cache_folder().ok is None
    monkeypatch.setenv("HYBRIMOE_CACHE", "/proc/none")
    found = kept.cache_folder()
    assert found.ok is False and found.detail.startswith("/proc/none cannot be written")


@pytest.mark.parametrize(("ending", "code"), [("| true", "141"), (">&-", "0")])
def test_nobody_reads_it(ending: str, code: str) -> None:
    script = f'"$@" doctor {ending}; echo "${{PIPESTATUS[0]}}" >&2'
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "hybrimoe_plugin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == f"{code}\n"


def test_it_says_whether_the_cache_learns_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "learn_token", print)
    assert backends.cache_learning() in doctor.examine()["backends"]
    assert backends.cache_learning().ok is True
    monkeypatch.setattr(adaptive, "learn_token", None)
    for found, reason in ((None, "not compiled"), (object(), "compiled from other sources")):
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name, found=found: found)
        check = backends.cache_learning()
        assert check.ok is False and check.detail.startswith(f"{reason}; optional: numpy")


@pytest.mark.parametrize(("tiles", "by"), [(0, "ggml"), (1, "AVX-512"), (2, "AMX")])
def test_it_says_how_many_rows_are_multiplied(
    tiles: int, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = SimpleNamespace(tiles=tiles, layout=kernels.LAYOUT)
    monkeypatch.setattr(kernels, "operations", compiled)
    check = backends.operations()
    assert check in doctor.examine()["backends"]
    assert check.ok is True and f"by {by}" in check.detail


def test_it_says_that_the_operations_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "operations", None)
    check = backends.operations()
    assert check.ok is False and check.detail.startswith("not compiled; optional: ggml")


def test_it_says_that_the_operations_are_older(monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace(tiles=2, layout=kernels.LAYOUT - 1)
    monkeypatch.setattr(kernels, "operations", older)
    check = backends.operations()
    assert check.ok is False and check.detail.startswith("compiled from older sources; optional")


def test_it_says_whether_there_can_be_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.server() in doctor.examine()["backends"] and backends.server().ok is True
    monkeypatch.setattr(libraries, "LIBRARIES", ("json", "no_such_library"))
    check = backends.server()
    assert check.ok is False
    assert check.detail.startswith("no_such_library not installed: pip install")


def test_broken_check_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def cuda() -> Check:
        raise RuntimeError("driver\nmissing")

    monkeypatch.setattr(backends, "cuda", cuda)
    assert Check("cuda", False, "RuntimeError: driver missing") in doctor.examine()["backends"]


def test_backend_that_ends_its_process_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -ILL $$\n")
    script.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setattr(backends.sys, "executable", str(script))
    check = backends.kt_kernel()
    assert check.ok is False
    assert "ended with -4" in check.detail


def test_model_that_cannot_be_read_is_an_answer(tmp_path: Path) -> None:
    checks = doctor.examine(str(tmp_path / "none.gguf"))["model"]
    assert [check.ok for check in checks] == [False, False]
    assert all("none.gguf" in check.detail for check in checks)


def test_damaged_profiles_are_counted(cache: Path) -> None:
    (cache / "profiles").mkdir()
    (cache / "profiles" / "a.json").write_text("{")
    check = next(
        check for check in doctor.examine()["kept on disk"] if check.name == "machine profiles"
    )
    assert check.ok is False
    assert "1 damaged" in check.detail
