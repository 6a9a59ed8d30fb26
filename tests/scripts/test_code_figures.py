"""The figures about the code, and their limits, on made-up trees."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "code_figures.py"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("code_figures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["code_figures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write(
    root: Path,
    name: str,
    text: str,
) -> None:
    """One file of a made-up tree."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


AIRY = '''"""A module."""

# Why.
def one(
    value,
):
    """A function."""
    return value  # and why not
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small checkout that keeps every limit."""
    for package in ("hybrimoe_plugin", "lever_ext", "eval", "tests"):
        write(tmp_path, f"{package}/__init__.py", "")
        write(tmp_path, f"{package}/airy.py", AIRY)
    return tmp_path


def test_a_file_is_measured(
    figures: ModuleType,
    tree: Path,
) -> None:
    found = figures.read(tree / "eval" / "airy.py", tree)
    assert found.path == "eval/airy.py"
    assert found.folder == "eval"
    assert found.lines == 8
    assert found.filled == 7
    assert found.functions == (5,)
    assert found.comments == 2
    assert max(found.widths) == len("    return value  # and why not")
    # Module, docstring (2), function (1), its arguments (2), docstring (2), return (3).
    assert found.nodes == 11
    assert found.density == pytest.approx(11 / 7)


def test_a_tree_within_the_limits_passes(
    figures: ModuleType,
    tree: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert figures.problems(tree) == []
    assert figures.main(["--check", "--root", str(tree)]) == 0
    printed = capsys.readouterr().out
    header, *lines = printed.splitlines()
    assert header.split() == list(figures.PACKAGES)
    assert "comments per 100 lines" in printed
    assert lines[0].split() == ["files", "2", "2", "2", "2"]


def test_long_files_are_named(
    figures: ModuleType,
    tree: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tree, "tests/fits.py", "\n" * 350)
    assert figures.problems(tree) == []
    write(tree, "tests/deep/long.py", "\n" * 351)
    assert figures.problems(tree) == ["tests/deep/long.py: 351 lines, at most 350 are allowed"]
    assert figures.main(["--root", str(tree)]) == 0
    assert figures.main(["--root", str(tree), "--check"]) == 1
    assert "tests/deep/long.py" in capsys.readouterr().err


def test_full_folders_are_named_but_for_two(
    figures: ModuleType,
    tree: Path,
) -> None:
    folders = ("hybrimoe_plugin/cli", "hybrimoe_plugin/families", "lever_ext/cli")
    for number in range(15):
        for folder in folders:
            write(tree, f"{folder}/module_{number}.py", "")
    assert figures.problems(tree) == ["lever_ext/cli: 15 modules, at most 14 are allowed"]
    (tree / "lever_ext" / "cli" / "module_0.py").unlink()
    write(tree, "lever_ext/cli/__init__.py", "")
    assert figures.problems(tree) == []


def test_density_counts_in_the_median_file_alone(
    figures: ModuleType,
    tree: Path,
) -> None:
    dense = "a = (b + c) * (d - e) / f(g, h, i=1)\n" * 5
    write(tree, "eval/dense.py", dense)
    assert figures.density(figures.modules(tree, "eval")) > 7.5
    (problem,) = figures.problems(tree)
    assert problem.startswith("eval: ")
    # Two airy files outweigh it, and a file of four lines has no density.
    write(tree, "eval/airy_too.py", AIRY)
    write(tree, "eval/short.py", dense[: len(dense) // 5] * 4)
    assert figures.problems(tree) == []


def test_tests_may_be_dense(
    figures: ModuleType,
    tree: Path,
) -> None:
    for number in range(3):
        write(tree, f"tests/dense_{number}.py", "a = b(c, d)[e](f, g(h, i), *j)\n" * 5)
    assert figures.problems(tree) == []


def test_percentiles(figures: ModuleType) -> None:
    assert figures.percentile([], 0.9) == 0
    assert figures.percentile([7], 0.9) == 7
    assert figures.percentile(range(11), 0.9) == 9
    assert figures.percentile([3, 1, 2], 0.5) == 2
