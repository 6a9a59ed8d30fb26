"""A whole model by the operations, and without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from steps import prefill, step

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.cpu.ggml import Ggml, Graph
from hybrimoe_plugin.compute.cpu.ggml.runtime import Forms
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph

needs.kt_kernel()

FAMILIES = {"mixtral": "Q8_0", "qwen2_moe": "Q8_0", "deepseek_v3": "F16"}
"""And the type of their matrices; the last one's heads are no whole blocks."""
ROUNDING = 0.05
"""Relative error of logits: 8 bits or bfloat16, in a model of two layers of random weights."""


def write(folder: Path, family: str) -> Path:
    return tiny.write(
        folder,
        family,
        types=lambda name: "F32" if "ffn_gate_inp" in name else FAMILIES[family],
    )


def logits(path: Path, backend: str) -> torch.Tensor:
    """Of prompts, short and long, and of tokens after one."""
    model: Any = load_model(None, path, progress=False, accelerator="none", cpu_backend=backend)[0]
    ids = tiny.tokens(40, batch=2)
    with torch.no_grad():
        cache = prefill(model, ids[:1, :9])
        found = [model(ids).logits, model(ids[:1, :9]).logits]
        found += [step(model, ids[:1, at : at + 1], cache).logits for at in range(9, 14)]
    model.hybrimoe.close()
    return torch.cat([each.reshape(-1) for each in found])


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_both_twins_give_the_same_answers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each computes by its own graphs."""
    needs.operations()
    path = write(tmp_path, family)
    ran: set[type] = set()
    for kind in (Graph, NativeGraph):
        run: Any = kind.run

        def note(graph: Any, run: Any = run, kind: type = kind) -> None:
            ran.add(kind)
            run(graph)

        monkeypatch.setattr(kind, "run", note)
    wanted = logits(path, "ggml")
    assert ran == {Graph}
    assert error(logits(path, "auto"), wanted) < ROUNDING
    assert NativeGraph in ran


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_needs_no_dot_of_ggml_s(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a processor where the dot of a type is wrong, by which indexed products go too."""
    needs.operations()
    path = write(tmp_path, family)
    wanted = logits(path, "ggml")
    known = Ggml.forms

    def restricted(ggml: Ggml, type_name: str) -> Forms:
        found = known(ggml, type_name)
        return found._replace(indexed=False) if type_name == FAMILIES[family] else found

    monkeypatch.setattr(Ggml, "forms", restricted)
    assert error(logits(path, "auto"), wanted) < ROUNDING


def test_it_works_without_a_compiler(tmp_path: Path) -> None:
    path = write(tmp_path, "mixtral")
    program = f"""
import sys
sys.modules["hybrimoe_plugin.compute.cpu.native.operations"] = None
import torch
from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.cpu.native.kernels import compiled
model, _ = load_model(None, {str(path)!r}, progress=False, accelerator="none")
assert not compiled()
assert model.hybrimoe.engines[0].cpu.name == "ggml"
ids = torch.arange(20)[None]
found = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
assert found.shape == (1, 23)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
