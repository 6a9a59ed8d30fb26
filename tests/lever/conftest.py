"""Tiny models on flash: two to four layers, distinct random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_plugin.hosts.transformers.skeleton import meta_model_of
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


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and threads that wait for a busy core cost
    milliseconds a call.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plain_models() -> dict[str, Any]:
    return {family: tiny_model(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def packs(
    plain_models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return {
        family: pack_model(model, family, tmp_path_factory.mktemp(family))
        for family, model in plain_models.items()
    }
