"""kt-kernel and the demo's source: one version everywhere, one command that installs them."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import sys
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from tiny_experts import layer

from hybrimoe_plugin import extras
from hybrimoe_plugin.cli import doctor
from hybrimoe_plugin.cli.checks import backends
from hybrimoe_plugin.cli.checks.check import Check
from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.compute.cpu import kt_kernel
from hybrimoe_plugin.compute.cpu.ggml import binding
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.engine import cpu_choice
from hybrimoe_plugin.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent


def test_the_version_stands_in_one_place() -> None:
    for extra in extras.EXTRAS:
        assert extra.lock.read_text().count(f"{extra.requirement} \\\n") == 1
        for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/*.py")]:
            if path.name not in ("LOG.md", "CHANGELOG.md"):  # these say what was
                named = re.findall(rf"{extra.name}==([\w.]*\w)", path.read_text())
                assert set(named) <= {extra.version}, path
    assert extras.KERNELS.version in binding.CHECKED_VERSIONS


def test_there_is_a_hash_for_each_wheel() -> None:
    wheels = extras.KERNELS.wheels
    assert wheels is not None
    assert extras.KERNELS.lock.read_text().count("--hash=sha256:") == len(wheels.pythons)


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("system", "Darwin", "this is Darwin on x86_64"),
        ("machine", "aarch64", "this is Linux on aarch64"),
        ("python_version_tuple", ("3", "10", "13"), "3.11 and 3.12, this is Python 3.10"),
        ("libc_ver", ("glibc", "2.31"), "glibc 2.35, this is glibc 2.31"),
        ("libc_ver", ("", ""), "this is another C library"),
    ],
)
def test_a_machine_without_a_wheel_is_told_so(
    name: str, answer: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {
        "system": "Linux",
        "machine": "x86_64",
        "python_version_tuple": ("3", "12", "1"),
        "libc_ver": ("glibc", "2.35"),
    }
    for function, value in {**machine, name: answer}.items():
        monkeypatch.setattr(extras.platform, function, lambda value=value: value)
    with pytest.raises(BackendError, match=said):
        extras.install(extras.KERNELS)
    assert "doctor" not in extras.KERNELS.remedy()


@pytest.fixture
def harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> extras.Extra:
    """A package in a wheel on the disk, which pip would install into a folder of its own."""
    wheel = tmp_path / "harmless-1.0-py3-none-any.whl"
    info = "harmless-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("harmless.py", "")
        metadata = "Metadata-Version: 2.1\nName: harmless\nVersion: 1.0\nRequires-Dist: none-such\n"
        archive.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (tmp_path / "harmless.txt").write_text(f"harmless==1.0 --hash=sha256:{digest}\n")
    site = tmp_path / "site"
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": tmp_path, "TARGET": site}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    monkeypatch.setattr(extras, "LOCKS", tmp_path)
    monkeypatch.syspath_prepend(str(site))
    return extras.Extra("harmless", "harmless", "1.0", 1)


def test_doctor_installs_what_is_missing(
    harmless: extras.Extra, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.fix(harmless)
    assert metadata.version("harmless") == "1.0"
    err = capsys.readouterr().err
    assert err.index("installing harmless==1.0 (1 MB)") < err.index("is installed and works")
    doctor.fix(harmless)
    assert "is installed already" in capsys.readouterr().err


def test_doctor_says_why_nothing_was_installed(
    harmless: extras.Extra, monkeypatch: pytest.MonkeyPatch
) -> None:
    with harmless.lock.open("a") as lock:
        lock.write(f"other==2.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(BackendError, match="harmless==1.0 was not installed: pip reached no"):
        doctor.fix(harmless)
    harmless.lock.write_text(f"harmless==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(BackendError, match="HASHES"):
        doctor.fix(harmless)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    uv = re.escape(f"uv pip install --python {sys.executable} --no-deps harmless==1.0")
    with pytest.raises(BackendError, match=uv):
        doctor.fix(harmless)


def test_kernels_that_do_not_load_are_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[extras.Extra] = []
    monkeypatch.setattr(extras, "install", called.append)
    monkeypatch.setattr(backends, "kt_kernel", lambda: Check("kt", False, "illegal instruction"))
    monkeypatch.setattr(backends, "ggml", lambda: Check("ggml", True, ""))
    assert main(["doctor", "--fix"]) == 2
    assert called == [extras.KERNELS]
    assert "does not work: illegal instruction" in capsys.readouterr().err


def test_without_kernels_every_load_says_what_it_costs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for a model, whatever its number of engines; and not where torch was asked for."""

    def missing() -> object:
        raise BackendError(f"kt-kernel is not installed: {extras.KERNELS.remedy()}")

    monkeypatch.setattr(cpu_choice, "import_kernel", missing)
    monkeypatch.setattr(cpu_choice, "Ggml", missing)
    monkeypatch.setattr(cpu_choice, "load_profile", lambda _: None)
    settings = Settings(profile="any")
    layers = [layer()]
    for _ in range(2):
        for first in (True, False):
            chosen, _ = cpu_choice.choose_cpu(settings, layers, None, first=first)
            assert chosen == "torch"
    notices = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(notices) == 2
    assert "13 times slower: kt-kernel is not installed: `hybrimoe doctor --fix`" in caplog.text
    caplog.clear()
    cpu_choice.choose_cpu(replace(settings, cpu_backend="torch"), layers, None)
    assert not caplog.records


def test_a_missing_kt_kernel_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kt_kernel", None)
    with pytest.raises(BackendError, match="kt-kernel"):
        kt_kernel.import_kernel()
