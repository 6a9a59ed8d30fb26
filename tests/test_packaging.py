"""The house rules: imports point one way, importing does nothing, the wheel holds what
users need.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from imports import circles, file_graph, modules, package_graph

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hybrimoe_plugin", "lever_ext", "eval")

ROOMS = (
    (
        *("core", "config", "setting_types", "errors"),
        *("extras", "files", "cache_folder", "kept_files"),
    ),
    ("device", "policy", "injection"),
    ("weights", "replay"),
    ("families",),
    ("compute",),
    ("engine",),
    ("operators",),
    ("decode",),
    ("hosts",),
    ("demo",),
    ("serve",),
    ("cli",),
)
"""Rooms of hybrimoe_plugin from the ground up. A room imports only from those below it."""

FRONT = ("hybrimoe_plugin", "hybrimoe_plugin.__main__")
"""The package's own names and `python -m`: they import what users call, from any room."""

ABOVE = {
    "hybrimoe_plugin": ("lever_ext", "eval"),
    "lever_ext": ("eval", "hybrimoe_plugin.demo", "hybrimoe_plugin.cli"),
    "lever_ext.cli": ("eval",),
}
"""Package -> what it never imports. lever_ext.cli may use the command line's own helpers."""

TORCH_FREE = ("core", "config", "errors", "policy", "replay")

KNOWN = modules(ROOT, PACKAGES)
FILES = file_graph(KNOWN)


def level(module: str) -> int | None:
    """Storey of a hybrimoe_plugin module; None where it is of another package or at the front."""
    parts = module.split(".")
    if parts[0] != "hybrimoe_plugin" or module in FRONT:
        return None
    return next(number for number, rooms in enumerate(ROOMS) if parts[1] in rooms)


def test_rooms_import_only_what_lies_below_them() -> None:
    wrong = []
    for module, others in FILES.items():
        for other in others:
            own, theirs = level(module), level(other)
            if own is None or theirs is None:
                continue
            same_room = module.split(".")[1] == other.split(".")[1]
            if theirs > own or (theirs == own and own > 0 and not same_room):
                wrong.append(f"{module} imports {other}")
    assert not wrong, wrong


def forbidden(module: str) -> tuple[str, ...]:
    """What a module never imports: the rule of the innermost package that has one."""
    inside = [package for package in ABOVE if f"{module}.".startswith(f"{package}.")]
    return ABOVE[max(inside, key=len)] if inside else ()


def test_packages_import_only_what_lies_below_them() -> None:
    wrong = []
    for module, others in FILES.items():
        above = forbidden(module)
        wrong += [f"{module} imports {other}" for other in others if other.startswith(above)]
    assert not wrong, wrong


def test_no_circle_of_files() -> None:
    assert circles(FILES) == []


def test_no_circle_of_packages() -> None:
    assert circles(package_graph(FILES, KNOWN)) == []


def test_circles_and_imports_inside_functions_are_seen(tmp_path: Path) -> None:
    one, two = tmp_path / "made" / "one", tmp_path / "made" / "two"
    for folder in (tmp_path / "made", one, two):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    (one / "a.py").write_text("def late():\n    from made.two.b import x\n")
    (two / "b.py").write_text("from typing import TYPE_CHECKING\nfrom made.two import c\n")
    (two / "c.py").write_text("if True:\n    import made.one.a\n")
    known = modules(tmp_path, ["made"])
    files = file_graph(known)
    assert files["made.two.b"] == {"made.two.c"}
    assert circles(files) == [["made.one.a", "made.two.b", "made.two.c"]]
    assert circles(package_graph(files, known)) == [["made.one", "made.two"]]


def test_policies_know_nothing_of_torch() -> None:
    for module, path in KNOWN.items():
        if module.split(".")[1:2] and module.split(".")[1] in TORCH_FREE:
            names = {
                name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                for name in (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
            }
            assert not names & {"torch", "transformers"}, path


def test_sizes_and_density_keep_their_limits() -> None:
    program = [sys.executable, "scripts/code_figures.py", "--check"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


HEADERS = Path(sysconfig.get_path("include"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(not (HEADERS / "Python.h").exists(), reason="no headers of Python")
def test_c_compiles_without_a_warning() -> None:
    for source in (ROOT / "hybrimoe_plugin").rglob("*.c"):
        lines = source.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if len(line) > 100] == []
        command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
        done = subprocess.run(
            [*command, f"-I{HEADERS}", str(source)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_importing_starts_nothing() -> None:
    program = (
        "import sys, threading, builtins\n"
        "import hybrimoe_plugin, hybrimoe_plugin.cli.main\n"
        "import hybrimoe_plugin.policy.controller, hybrimoe_plugin.replay.trace\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "import torch\n"
        "torch.cuda.init = torch.cuda._lazy_init = None\n"
        "before = threading.active_count()\n"
        "import hybrimoe_plugin.operators.bind, hybrimoe_plugin.hosts.transformers, "
        "hybrimoe_plugin.demo, lever_ext\n"
        "assert 'kt_kernel' not in sys.modules, 'kt-kernel was imported'\n"
        "assert threading.active_count() == before, 'a thread was started'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_packaged_rules_are_sound_yaml_and_found() -> None:
    rules = [item for item in files("optimize_rules").iterdir() if item.name.endswith(".yaml")]
    assert len(rules) >= 6
    for item in rules:
        assert isinstance(yaml.safe_load(item.read_text()), list)


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "docs/structure.md", "docs/LOG.md"])
def test_documents_are_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 200


def test_what_both_hosts_load_does_without_the_newer_one() -> None:
    code = (
        "import sys, hybrimoe_plugin.operators.bind as _; "
        "print('hybrimoe_plugin.compute.attention.kv_cache' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip() == "False"
    )  # classic kTransformers brings a transformers without its cache layers
