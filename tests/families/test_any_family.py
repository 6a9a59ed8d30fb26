"""Families without a file of their own work from checkpoint directories, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from loading import injected

from eval.models.agreement import check_agreement
from eval.models.shrunk import moe_types, shrunk_model
from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.weights.checkpoint.names import find_names
from scripts import models_doc

SETTINGS: dict[str, Any] = {"accelerator": "emulated", "cache_ratio": 0.25}
WORKING = (
    "deepseek_v4",  # clamped experts, and routers that ask for token ids
    "gemma4_text",  # experts beside the MLP, gelu, layers with heads of other sizes
    "hunyuan_v1_moe",  # a router whose linear is read, not called
    "jamba",  # state spaces
    "lfm2_moe",  # short convolutions, a correction that may be None
    "minimax_m2",  # a correction that is handed to the router
    "phimoe",  # a head with a bias
    "qwen3_5_moe_text",  # gated delta-net layers
)


def known(model_type: str) -> None:
    if model_type not in moe_types():
        pytest.skip(f"this transformers has no {model_type}")


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("model_type", WORKING)
def test_a_directory_is_enough(model_type: str, backend: str, tmp_path: Path) -> None:
    known(model_type)
    right = shrunk_model(model_type)
    right.save_pretrained(tmp_path)
    model = injected(tmp_path, cpu_backend=backend, **SETTINGS)
    try:
        # Kernels sum in another order than torch.
        close = {} if backend == "torch" else {"rtol": 1e-3, "atol": 1e-4}
        check_agreement(model, right, **close)
    finally:
        model.hybrimoe.close()


def test_a_table_may_name_an_expert_twice_for_a_token(tmp_path: Path) -> None:
    known("deepseek_v4")
    right = shrunk_model("deepseek_v4")  # whose table names expert 0 only
    right.save_pretrained(tmp_path)
    model = injected(tmp_path, cpu_backend="auto")
    check_agreement(model, right, rtol=1e-3, atol=1e-4)  # kernels sum in another order
    model.hybrimoe.close()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llama4_text", "experts of Llama4TextExperts are not supported"),
        ("longcat_flash", "experts of LongcatFlashExperts are not supported"),
        ("nemotron_h", "NemotronHExperts are not supported: they have no gate projection"),
        ("doge", "DogeForCausalLM has no layers with routed experts"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    known(model_type)
    shrunk_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(HybriMoEError, match=reason):
        injected(tmp_path, **SETTINGS)


def test_tensors_without_a_place_and_parameters_without_tensors_are_named() -> None:
    model = shrunk_model("mixtral")
    names = list(model.state_dict())
    with pytest.raises(HybriMoEError, match=r"nothing there for 'lm_head\.weight'; .*'model\.x'"):
        find_names(model, [*names[:-1], "model.x"], "DIR")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", moe_types())
def test_the_page_says_where_every_type_stands(model_type: str) -> None:
    page = models_doc.PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip("the page was written with another transformers")
    assert models_doc.row(models_doc.stand(model_type)) in page.splitlines()


def test_the_page_has_no_other_types() -> None:
    page = models_doc.PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip("the page was written with another transformers")
    assert sum(line.startswith("| `") for line in page.splitlines()) == len(moe_types())
