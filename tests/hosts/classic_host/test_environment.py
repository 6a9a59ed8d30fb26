"""The classic host's own environment: making it, sharing packages with it, and the way to it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrimoe_plugin.cli.main import COMMANDS, main
from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.hosts.ktransformers import environment, release
from hybrimoe_plugin.hosts.ktransformers.demo import classic_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _default_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", lambda: None)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been run; an environment is a few empty folders."""
    found: list[str] = []

    def create(folder: Path, symlinks: bool, with_pip: bool) -> None:
        assert symlinks and with_pip
        found.append("venv")
        for place in (environment._shared(folder).parent, folder / "bin"):
            place.mkdir(parents=True, exist_ok=True)

    def run(command: list[str], problem: str) -> None:
        found.append(" ".join(command[2:4]))

    monkeypatch.setattr(venv, "create", create)
    monkeypatch.setattr(environment, "_run", run)
    return found


def test_it_is_made_once_and_renewed_when_something_changes(
    steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kt"
    assert environment.make(folder) > 0
    made = ["venv", "pip install", "hybrimoe_plugin install_ktransformers"]
    assert steps == made
    assert environment.make(folder) == 0 and steps == made
    monkeypatch.setattr(environment, "SDIST_SHA256", "another")
    assert environment.make(folder) > 0 and steps == made * 2


def test_an_interrupted_one_is_made_again(
    steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(environment, "_share", stop)
        with pytest.raises(KeyboardInterrupt):
            environment.make(tmp_path)
    assert environment.make(tmp_path) > 0


def test_a_folder_with_something_else_stays_as_it_is(
    steps: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        assert main(["install_ktransformers", "--venv", str(folder)]) == 2
        assert "something else is there" in capsys.readouterr().err
    assert not steps


def test_not_from_a_classic_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", lambda: release.VERSION)
    with pytest.raises(ConfigError, match="run this where the default host is"):
        environment.make(tmp_path)


def test_what_pip_says_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(returncode=1, stderr="ERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_arguments, **_options: done)
    with pytest.raises(BackendError, match="it failed: ERROR: no network"):
        environment._run(["pip"], "it failed")


def test_its_own_packages_come_before_those_it_shares(tmp_path: Path) -> None:
    folder = tmp_path / "kt"
    venv.create(folder, with_pip=False)
    own = environment._shared(folder).parent
    (own / "numpy.py").write_text("OWN = True")
    environment._share(folder)
    code = (
        "import importlib.util, numpy; assert numpy.OWN\n"
        "print(importlib.util.find_spec('torch').origin)"
    )
    python = str(folder / "bin" / "python")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], env=clean, capture_output=True, text=True)
    assert done.stdout.startswith(sys.prefix), done.stderr
    command = [str(folder / "bin" / "hybrimoe"), "--version"]
    assert subprocess.run(command, env=clean, capture_output=True).stdout.startswith(b"hybrimoe")


def test_the_lock_is_one_file_and_in_the_wheel() -> None:
    assert environment.LOCK.is_file()
    inside = environment.LOCK.relative_to(ROOT / "hybrimoe_plugin").parent
    assert f'"{inside}/*.txt"' in (ROOT / "pyproject.toml").read_text()
    assert not (ROOT / "scripts" / "requirements" / "ktransformers.txt").exists()


def exists(command: str) -> bool:
    """Whether a command that a message names is one."""
    words = command.split()
    if words[0] == "make":
        return f"\n{words[1].rstrip(',')}:" in (ROOT / "Makefile").read_text()
    return Path(words[0]).name == "hybrimoe" and words[1] in {each.name for each in COMMANDS}


@pytest.mark.parametrize(
    ("transformers", "checkout", "said"),
    [
        ("5.17.0", True, "make setup-ktransformers, in "),
        ("5.17.0", False, "hybrimoe install_ktransformers --venv DIR"),
        ("4.43.2", True, "hybrimoe install_ktransformers"),
        (None, False, "hybrimoe install_ktransformers"),
    ],
)
def test_the_way_to_it_exists_where_it_is_told(
    transformers: str | None, checkout: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(_name: str) -> str:
        if transformers is None:
            raise metadata.PackageNotFoundError
        return transformers

    monkeypatch.setattr(release.metadata, "version", version)
    monkeypatch.setattr(release, "is_checkout", lambda: checkout)
    told = release.how_to_install()
    assert told.startswith(said) and exists(told)


def test_the_demo_model_is_built_by_the_environment_that_made_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / release.MADE).write_text("/where/it/came/from\n/its/packages\n")
    with pytest.raises(Exception, match="demo model is not there") as error:
        classic_folder("mixtral")
    told = str(error.value).rpartition(": ")[2]
    assert told == "/where/it/came/from/bin/hybrimoe demo_model --form mixtral" and exists(told)


def test_no_message_names_what_only_a_checkout_has() -> None:
    """`how_to_install` alone may, after looking whether this is one."""
    for room in ("hosts/ktransformers", "cli/ktransformers"):
        for path in (ROOT / "hybrimoe_plugin" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    named = re.findall(r"scripts/\w+\.py\b|make [\w-]*ktransformers", node.value)
                    inside = path.name in ("release.py", "environment.py")
                    assert not named or inside, f"{path}: {named}"
