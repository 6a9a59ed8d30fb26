"""Tiny models on flash, prompts and drafts that the tests of lever_ext share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybrimoe_plugin.errors import BudgetError
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model_of
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import low_bit_copy
from lever_ext.drafts.ngram import NGramDraft
from lever_ext.early_exit.gate import ExitGate
from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings
from lever_ext.flash.dram_plan import plan_dram
from lever_ext.flash.pack import FlashPack
from lever_ext.flash.source import StateDictSource
from lever_ext.flash.writer import write_pack

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 8,
    },
}


def tiny_config(family: str) -> dict[str, Any]:
    return {"model_type": family, **COMMON, **FAMILIES[family]}


def tiny_model(family: str, seed: int = 0) -> Any:
    """A plain model in memory with weights large enough for its choices to be distinct."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config(family)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4 if parameter.shape[0] == 64 else 0.15)
    return model.eval()


def pack_model(model: Any, family: str, directory: Path) -> Path:
    config = tiny_config(family)
    source = StateDictSource(dict(model.state_dict()), f"tiny {family}")
    return write_pack(source, meta_model_of(config, torch.float32), config, directory, "float32")


def prompt(seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def least_budget(path: Path) -> int:
    pack = FlashPack.open(path)
    low, high = 0, plan_dram(pack, None).nbytes
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_dram(pack, middle)
            high = middle
        except BudgetError:
            low = middle
    pack.close()
    return high


def a_gate(model: Any, layer: int = 2, threshold: float = 0.15) -> ExitGate:
    predictor = ExitPredictor(model.get_output_embeddings().weight.detach(), layer, 0.0, "")
    return ExitGate(predictor, PruneSettings(threshold=threshold, least_nodes=1))


def make_draft(name: str, plain: Any) -> Any:
    if name == "n-gram":
        return NGramDraft()
    if name == "wrong":
        torch.manual_seed(5)
        other = low_bit_copy(plain, 2, 32)
        torch.nn.init.normal_(other.get_input_embeddings().weight)
        return LanguageModelDraft(other)
    return LanguageModelDraft(low_bit_copy(plain, 3, 32))
