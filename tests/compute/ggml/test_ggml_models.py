"""A whole model on a machine where some of ggml's kernels are wrong: the others compute it."""

from __future__ import annotations

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

needs.kt_kernel()

ONLY_INDEXED = Forms(row=False, rows=False, indexed=True, lookup=True)
ONLY_PLAIN = Forms(row=True, rows=True, indexed=False, lookup=True)
ONLY_SEVERAL_ROWS = Forms(row=False, rows=True, indexed=True, lookup=True)


def logits(path: Path, backend: str) -> torch.Tensor:
    """Of a prompt, and of a token after it."""
    model: Any = load_model(None, path, progress=False, accelerator="none", cpu_backend=backend)[0]
    ids = tiny.tokens(40, batch=2)
    with torch.no_grad():
        cache = prefill(model, ids[:1, :9])
        found = [
            model(ids).logits,
            model(ids[:1, :9]).logits,
            step(model, ids[:1, 9:10], cache).logits,
        ]
    model.hybrimoe.close()
    return torch.cat([each.reshape(-1) for each in found])


@pytest.mark.parametrize("forms", [ONLY_INDEXED, ONLY_PLAIN, ONLY_SEVERAL_ROWS])
@pytest.mark.parametrize(
    ("family", "kind"), [("mixtral", "Q8_0"), ("qwen2_moe", "F16"), ("deepseek_v2", "F16")]
)
def test_a_model_needs_no_wrong_form(
    family: str, kind: str, forms: Forms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention with and without latents, MLPs, experts, embeddings, a head."""
    path = tiny.write(
        tmp_path, family, types=lambda name: "F32" if "ffn_gate_inp" in name else kind
    )
    wanted = logits(path, "ggml")
    taken: set[str] = set()
    known = Ggml.forms

    def restricted(ggml: Ggml, type_name: str) -> Forms:
        return forms if type_name == kind else known(ggml, type_name)

    def note(method: str) -> None:
        compute = getattr(Graph, method)

        def product(graph: Graph, weight: Any, x: Any, *rest: Any) -> Any:
            if weight.type_name == kind:
                taken.add("row" if method == "_plain" and x.shape[-2] == 1 else method)
            return compute(graph, weight, x, *rest)

        monkeypatch.setattr(Graph, method, product)

    monkeypatch.setattr(Ggml, "forms", restricted)
    monkeypatch.setattr("hybrimoe_plugin.compute.cpu.ggml.library._SPEEDS", {})
    note("_plain")
    note("_indexed")
    found = logits(path, "ggml")
    assert (
        taken
        == {
            ONLY_INDEXED: {"_indexed"},
            ONLY_PLAIN: {"_plain", "row"},
            ONLY_SEVERAL_ROWS: {"_plain", "_indexed"},
        }[forms]
    )
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
