"""Mixture-of-experts families beyond the first ones, with all their weights on flash."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import MODEL_ARCH_NAMES
from transformers import DynamicCache

from eval.models.agreement import check_agreement
from eval.models.shrunk import moe_types, shrunk_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.errors import HybriMoEError, SpeculationError
from hybrimoe_plugin.families.registry import family_of
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.make import low_bit_of
from lever_ext.flash.pack import FlashPack
from lever_ext.packing import pack_model
from lever_ext.target import load_target
from lever_ext.tree.policies import make_policy

WITH_TREES = (
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "minimax_m2",
    "olmoe",
    "phimoe",
)
WITHOUT = ("gemma4_text", "gpt_oss", "qwen3_5_moe_text", "qwen3_next")
"""Those that keep sliding windows or states."""
FROM_GGUF = ("deepseek_v3", "gpt_oss", "granitemoe", "qwen3_5_moe_text")
"""Corrections in buffers, biases and experts that lie transposed, rows in another order, values in
another form."""
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def known(model_type: str) -> Any:
    if model_type not in moe_types():
        pytest.skip("this release of transformers does not have it")
    return shrunk_model(model_type)


@pytest.mark.parametrize("model_type", (*WITH_TREES, *WITHOUT))
def test_a_packed_directory_is_the_model(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = known(model_type)
    right.save_pretrained(tmp_path / "model")
    pack_model(tmp_path / "pack", tmp_path / "model", None, "float32")
    target = load_target(tmp_path / "pack", dram_budget=None)
    check_agreement(target.model, right)
    prompt = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(2))
    alone = right.generate(prompt, **GREEDY)
    with caplog.at_level(logging.WARNING):
        decoder = LeverDecoding(LanguageModelDraft(right), make_policy("fixed", 6), target)
    assert ("cannot verify token trees" in caplog.text) == (model_type in WITHOUT)
    answer = target.model.generate(prompt, custom_generate=decoder, **GREEDY)
    assert torch.equal(answer, alone)
    drafted = sum(cycle.nodes for cycle in decoder.stats.cycles) > len(decoder.stats.cycles)
    assert drafted == (model_type in WITH_TREES)
    decoder.close()
    target.close()


@pytest.mark.parametrize("model_type", FROM_GGUF)
def test_a_packed_file_is_the_model(model_type: str, tmp_path: Path) -> None:
    if family_of(model_type).architectures[0] not in MODEL_ARCH_NAMES.values():
        pytest.skip("this gguf package does not know the architecture")
    right = known(model_type)
    export_gguf(right, tmp_path / "model.gguf")
    pack_model(tmp_path / "pack", None, tmp_path / "model.gguf", "float32")
    target = load_target(tmp_path / "pack")
    check_agreement(target.model, right)
    target.close()


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_next"])
def test_an_interrupted_answer_leaves_windows_and_states_as_they_were(
    model_type: str, tmp_path: Path
) -> None:
    right = known(model_type)
    right.save_pretrained(tmp_path / "model")
    pack_model(tmp_path / "pack", tmp_path / "model", None, "float32")
    target = load_target(tmp_path / "pack")
    decoder = LeverDecoding(None, make_policy("none"), target)
    prompt = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(2))
    alone = right.generate(prompt, **GREEDY)
    layer = target.model.base_model.layers[2]
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # two layers of the third new token's pass have written their states
            raise ZeroDivisionError

    cache, name = DynamicCache(config=right.config), cache_name(right)
    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        target.model.generate(prompt, custom_generate=decoder, **{name: cache}, **GREEDY)
    hook.remove()
    kept = alone[:, : cache.get_seq_length() + 1]
    rest = {**GREEDY, "max_new_tokens": alone.shape[1] - kept.shape[1]}
    answer = target.model.generate(kept, custom_generate=decoder, **{name: cache}, **rest)
    assert torch.equal(answer, alone)
    target.close()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("nemotron_h", "NemotronHExperts are not supported: they have no gate projection"),
        ("deepseek_v4", "floating point, and .*tid2eid is torch.int64"),
    ],
)
def test_what_cannot_be_a_target_is_refused_before_a_file_is_made(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    known(model_type).save_pretrained(tmp_path / "model")
    with pytest.raises(HybriMoEError, match=reason):
        pack_model(tmp_path / "pack", tmp_path / "model", None, "float32")
    assert not (tmp_path / "pack").exists()


def test_what_is_computed_in_float32_is_stored_so(tmp_path: Path) -> None:
    right = known("deepseek_v3")
    right.save_pretrained(tmp_path / "model")
    pack_model(tmp_path / "pack", tmp_path / "model", None, "bfloat16")
    pack = FlashPack.open(tmp_path / "pack")
    stored = {tensor.name: tensor.dtype for block in pack.index.blocks for tensor in block.tensors}
    pack.close()
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"] == "float32"
    assert stored["model.layers.1.self_attn.o_proj.weight"] == "bfloat16"


@pytest.mark.parametrize("model_type", ["gemma4_text", "gpt_oss"])
def test_experts_that_no_low_bit_draft_copies_are_refused(model_type: str, tmp_path: Path) -> None:
    known(model_type).save_pretrained(tmp_path / "model")
    pack_model(tmp_path / "pack", tmp_path / "model", None, "float32")
    target = load_target(tmp_path / "pack")
    with pytest.raises(SpeculationError, match="take --draft ngram or --draft none"):
        low_bit_of(target)
    target.close()
