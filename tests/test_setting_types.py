"""What type checkers, `help()` and notebooks see of the Python interface."""

from __future__ import annotations

import inspect
import io
import pydoc
import re
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import tiny

import hybrimoe_plugin
import lever_ext
from hybrimoe_plugin import load_model
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.families.packaged_rules import rules_path
from hybrimoe_plugin.injection.rules import DEVICE_KEYS
from hybrimoe_plugin.setting_types import EngineSettings

ROOT = Path(__file__).resolve().parent.parent
HINTS = get_type_hints(EngineSettings)

MYPY = """\
[mypy]
follow_imports = skip
[mypy-hybrimoe_plugin,hybrimoe_plugin.setting_types,hybrimoe_plugin.hosts.*]
follow_imports = silent
"""
"""Everything else is not followed, which takes a second in place of a minute."""

CALLS = """\
from hybrimoe_plugin import load_model
load_model(None, "m.gguf", cache_ratio=0.25, cache_bytes="4GiB", scheduler="static")
load_model(None, "m.gguf", cache_ration=0.25)
load_model(None, "m.gguf", scheduler="statik")
"""


def test_the_typed_settings_are_the_settings() -> None:
    by_name = {item.name: item for item in fields(Settings)}
    assert list(HINTS) == [*by_name, *DEVICE_KEYS]
    for name, item in by_name.items():
        choices = item.metadata.get("choices")
        if choices is not None:
            assert get_origin(HINTS[name]) is Literal
            assert get_args(HINTS[name]) == choices
        elif name != "cache_bytes":  # a size may be text
            assert str(HINTS[name]).replace("<class '", "").replace("'>", "") == item.type


def test_a_misspelt_setting_fails_the_type_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = pytest.importorskip("mypy.api")
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "calls.py").write_text(CALLS)
    said, problems, _ = api.run(["--config-file", "mypy.ini", "calls.py"])
    assert not problems
    wrong = re.findall(r"^calls.py:(\d+): error: (.*)", said, re.MULTILINE)
    assert [line for line, _ in wrong] == ["3", "4"], said
    assert 'Unexpected keyword argument "cache_ration"' in wrong[0][1]
    assert "scheduler" in wrong[1][1]


def test_help_says_something_about_every_public_name() -> None:
    for package in (hybrimoe_plugin, lever_ext):
        page = pydoc.render_doc(package, renderer=pydoc.plaintext)
        for name in package.__all__:
            found = getattr(package, name)
            if name.startswith("__"):
                continue
            assert name in page
            assert inspect.getdoc(found)
            for method, value in vars(found).items() if inspect.isclass(found) else ():
                if inspect.isfunction(value) and not method.startswith("_"):
                    assert inspect.getdoc(value), f"{name}.{method}"
    assert "cache_ratio" in (inspect.getdoc(load_model) or "")


class Notebook(io.TextIOBase):
    """A stream that is no terminal and no file."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


def test_a_notebook_s_thread_loads_and_shows_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stream has a file descriptor, and the thread is not the one that gets signals."""
    path = tiny.write(tmp_path, "mixtral")
    out, err = Notebook(), Notebook()
    found: list[Any] = []

    def run() -> None:
        settings: dict[str, Any] = {"accelerator": "emulated", "cpu_backend": "torch"}
        model, _ = load_model(None, path, cache_ratio=0.5, profile="laptop-8gb", **settings)
        before = repr(model.hybrimoe)
        model(tiny.tokens(3))
        found.extend([before, repr(model.hybrimoe)])
        model.hybrimoe.close()

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert out.text == ""
    assert "loading weights" in err.text
    before, after = found
    assert before.splitlines() == [
        "HybriMoE of MixtralForCausalLM",
        "  2 layers of 8 experts, 2 for each token; CPU: torch; accelerator: emulated, 8 of 16 "
        "experts cached; scheduler hybrimoe, cache adaptive, prefetch expected",
        "  so far: not called",
    ]
    assert re.search(r"so far: 2 layer calls, \d+\.\d% of the experts were cached", after)


def test_a_model_without_an_accelerator_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny.write(tmp_path, "mixtral")
    settings: dict[str, Any] = {"accelerator": "none", "profile": "laptop-8gb"}
    model, _ = load_model(None, path, progress=False, cache_ratio=0.25, **settings)
    assert [line for line in caplog.messages if "cache_ratio" in line] == [
        "cache_ratio has no effect: there is no accelerator here; accelerator='emulated' tries it"
    ]
    model(tiny.tokens(3))
    assert re.search(r"so far: 2 layer calls, \d\.\d\d s in experts", repr(model.hybrimoe))
    model.hybrimoe.restore()
    assert repr(model.hybrimoe).startswith("HybriMoE of MixtralForCausalLM, restored\n")
    caplog.clear()
    rules = tmp_path / "rules.yaml"
    text = rules_path("Mixtral", None).read_text()
    rules.write_text(
        text.replace("cache: adaptive\n", "cache: adaptive\n      cache_ratio: 0.25\n")
    )
    model, _ = load_model(None, path, rules, progress=False, **settings)
    model.hybrimoe.close()
    assert "cache_ratio" not in caplog.text, "rules are for other machines too"
