"""What the pages say is so: links lead somewhere, examples are valid, generated parts are fresh."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import hybrimoe_plugin
from hybrimoe_plugin.injection.rules import parse_rules

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
STRUCTURE = DOCS / "structure.md"
SETTINGS = DOCS / "settings.md"
HOW_IT_WORKS = DOCS / "how-it-works.md"
RULES = DOCS / "rules.md"
TROUBLESHOOTING = DOCS / "troubleshooting.md"
PAGES = [README, CHANGELOG, CONTRIBUTING, *sorted(DOCS.glob("*.md"))]

HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FIRST_COLUMN = re.compile(r"^\| (.*?) \|", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
LINT = re.compile(r"^lint:.*\n((?:\t.*\n)+)", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
SOURCES = ("hybrimoe_plugin", "lever_ext", "scripts")


def script(name: str) -> ModuleType:
    """A module of `scripts/`, which is no package."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    pattern = rf"```{language}\n(.*?)```"
    return re.findall(pattern, text_of(page), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    found = set()
    for heading in HEADING.findall(text_of(page)):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.replace(" ", "-"))
    return found


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings of this repository; other sites are not asked."""
    for link in LINK.findall(text_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page
        if path:
            target = page.parent / path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_readme_is_short() -> None:
    lines = text_of(README).splitlines()
    assert len(lines) <= 132


def test_every_page_is_linked_from_the_readme_or_the_structure() -> None:
    linking = text_of(README) + text_of(STRUCTURE)
    for page in DOCS.glob("*.md"):
        # A page that nothing leads to is never read.
        assert page.name in linking


def test_settings_are_those_of_the_code() -> None:
    fresh = script("settings_doc").page()
    page = text_of(SETTINGS)
    assert page == fresh, "run python scripts/settings_doc.py"


def test_the_layer_figure_is_the_schedulers_own() -> None:
    figure = script("layer_figure")
    drawn = text_of(figure.FIGURE)
    assert drawn == figure.svg(), "run python scripts/layer_figure.py"


def test_the_worked_layer_has_the_schedulers_times() -> None:
    """The page does the same sums in words."""
    figure = script("layer_figure")
    page = " ".join(text_of(HOW_IT_WORKS).split())
    for plan in figure.plans():
        time = f"{plan.makespan_us:,.0f}"
        assert f"**{time} µs**" in page
    shorter = figure.with_one_prefetched()
    assert f"from 900 to {shorter:.0f} µs" in page


def test_example_rules_are_valid() -> None:
    """Parsed like a user's file: keys, types, patterns and class paths."""
    found = blocks(RULES, "yaml")
    assert len(found) == 2
    for block in found:
        parse_rules(block, "rules.md")


@each_page
def test_python_examples_import_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                names = [alias.name for alias in node.names]
                assert set(names) <= set(dir(module))


def messages() -> str:
    """Every piece of text in the sources, adjoining literals joined as Python joins them."""
    found = []
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(text_of(path))
            found += texts_in(tree)
    return "\n".join(found)


def texts_in(tree: ast.AST) -> list[str]:
    """Literals, and the fixed parts of f-strings."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant):
            continue
        if isinstance(node.value, str):
            found.append(node.value)
    return found


def test_the_symptoms_are_real_messages() -> None:
    """What the first columns quote is said by the program, word for word."""
    quoted = []
    page = text_of(TROUBLESHOOTING)
    for symptom in FIRST_COLUMN.findall(page):
        quoted += CODE.findall(symptom)
    assert len(quoted) > 30
    said = messages()
    for part in quoted:
        assert part in said


def test_the_version_is_one_and_the_changelog_has_it() -> None:
    version = hybrimoe_plugin.__version__
    project = text_of(ROOT / "pyproject.toml")
    assert f'\nversion = "{version}"\n' in project
    changes = text_of(CHANGELOG)
    assert f"\n## [{version}]" in changes


def linted() -> list[str]:
    """The commands of `make lint`, as the hooks write them."""
    makefile = text_of(ROOT / "Makefile")
    (recipe,) = LINT.findall(makefile)
    commands = recipe.replace("@$(BIN)", ".venv/bin")
    return [line.strip() for line in commands.splitlines()]


def test_hooks_run_what_make_lint_runs() -> None:
    config = yaml.safe_load(text_of(ROOT / ".pre-commit-config.yaml"))
    entries = []
    for repo in config["repos"]:
        assert repo["repo"] == "local"
        for hook in repo["hooks"]:
            # Any other language would fetch the tool.
            assert hook["language"] == "system"
            entries.append(hook["entry"])
    assert entries == linted()
