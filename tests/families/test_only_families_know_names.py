"""Outside `families` nothing is decided by the name of a model family: it is asked of the registry.

The classic host, whose classes are named by family, the demo's forms, and what tiny configs need
are let off.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from gguf.constants import MODEL_ARCH_NAMES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hybrimoe_plugin.families.registry import families

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hybrimoe_plugin", "lever_ext", "eval")
LET_OFF = (
    "hybrimoe_plugin/families/",
    "hybrimoe_plugin/hosts/ktransformers/",
    "hybrimoe_plugin/demo/",
    "eval/models/shrunk.py",
)

OWN = {family.model_type for family in families()}
OWN |= {name for family in families() for name in family.architectures}
SEQUENCES = (ast.Tuple, ast.List, ast.Set)
DECIDING_CALLS = ("startswith", "endswith", "get", "pop", "fromkeys")
NAMES = OWN | set(MODEL_ARCH_NAMES.values()) | set(CONFIG_MAPPING_NAMES)


def files() -> list[Path]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if not path.relative_to(ROOT).as_posix().startswith(LET_OFF):
                found.append(path)
    return found


def deciding(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions by which code decides: keys of dictionaries, sides of comparisons, match cases,
    subscripts, and arguments of `startswith` and the like.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (key for key in node.keys if key is not None)
        elif isinstance(node, ast.Compare):
            yield from (node.left, *node.comparators)
        elif isinstance(node, ast.MatchValue):
            yield node.value
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.Call):
            yield from node.args if called(node) in DECIDING_CALLS else ()


def called(node: ast.Call) -> str:
    """The name of the method that is called, if it is one."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else ""


def lists(tree: ast.Module) -> dict[str, ast.expr]:
    """Name -> value of a module's own lists of constants."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, SEQUENCES):
            for target in node.targets:
                found[ast.unparse(target)] = node.value
    return found


def names_in(expression: ast.expr, known: Mapping[str, ast.expr]) -> Iterator[str]:
    """The family names that an expression is, or lists."""
    if isinstance(expression, ast.Name) and expression.id in known:
        yield from names_in(known[expression.id], {})
    elif isinstance(expression, ast.Constant) and expression.value in NAMES:
        yield str(expression.value)
    elif isinstance(expression, SEQUENCES):
        for part in expression.elts:
            yield from names_in(part, known)


def decided_by_name(source: str) -> list[str]:
    tree = ast.parse(source)
    known = lists(tree)
    return [name for part in deciding(tree) for name in names_in(part, known)]


@pytest.mark.parametrize(
    "source",
    [
        'RULES = {"mixtral": 1}',
        'if config.model_type == "qwen3_moe": pass',
        'if "deepseek2" != architecture: pass',
        'if kind in ("llama", "qwen2"): pass',
        'KNOWN = ("llama", "qwen2")\nif kind in KNOWN: pass',
        'match kind:\n    case "gpt_oss": pass',
        'match kind:\n    case "olmoe" | "other": pass',
        'RULES["mixtral"]',
        'kind.startswith("qwen3")',
        'RULES.get("deepseek_v3")',
        'dict.fromkeys(["llama", "other"])',
    ],
)
def test_such_code_is_found(source: str) -> None:
    assert decided_by_name(source)


@pytest.mark.parametrize("source", ['build("mixtral")', 'NAMES = ("llama",)', '"""mixtral"""'])
def test_other_mentions_are_fine(source: str) -> None:
    assert not decided_by_name(source)


def test_nothing_else_decides_by_the_name_of_a_family() -> None:
    wrong = []
    for path in files():
        for name in decided_by_name(path.read_text(encoding="utf-8")):
            wrong.append(f"{path.relative_to(ROOT)}: {name!r}")
    assert wrong == []
