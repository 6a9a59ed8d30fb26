"""The house rules: imports point one way, importing does nothing, the wheel holds what
users need.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "core": 0, "config": 0, "errors": 0,
    "policy": 1, "timeline": 2, "replay": 2, "experts": 3,
    "engine": 4, "operators": 5, "injection": 5, "hosts": 6, "demo": 7, "cli": 8,
}  # fmt: skip
"""A package imports only from its own level's file or package, or from below."""
ALLOWED_ASIDE = {("hosts", "hosts")}
TORCH_FREE = ("core", "config", "errors", "policy", "replay")


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it is itself imported: not inside functions, not for type
    checks.
    """
    found = set()
    waiting = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif (
            isinstance(node, ast.If | ast.Try | ast.With)
            and "TYPE_CHECKING" not in ast.dump(node)[:120]
        ):
            waiting += ast.iter_child_nodes(node)  # type: ignore[arg-type]
    return found


def sources() -> list[Path]:
    return sorted((ROOT / "hybrimoe_plugin").rglob("*.py"))


def test_imports_point_down() -> None:
    wrong = []
    for path in sources():
        parts = path.relative_to(ROOT / "hybrimoe_plugin").with_suffix("").parts
        if parts[0] not in LAYERS:
            continue
        for module in imports(path):
            names = module.split(".")
            if names[0] == "lever_ext":
                wrong.append(f"{path.name} imports {module}")
            if names[0] == "hybrimoe_plugin" and len(names) > 1 and names[1] in LAYERS:
                own, other = LAYERS[parts[0]], LAYERS[names[1]]
                if other > own or (
                    other == own and names[1] != parts[0] and own > 0 and names[1] != "timeline"
                ):
                    wrong.append(f"{'/'.join(parts)} imports {module}")
    assert not wrong, wrong


def test_policies_know_nothing_of_torch() -> None:
    for path in sources():
        if path.relative_to(ROOT / "hybrimoe_plugin").with_suffix("").parts[0] in TORCH_FREE:
            assert not {
                name for name in imports(path) if name.split(".")[0] in ("torch", "transformers")
            }, path


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
        "print('hybrimoe_plugin.operators.kv_cache' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip() == "False"
    )  # classic kTransformers brings a transformers without its cache layers
