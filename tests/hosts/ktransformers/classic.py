"""Tiny random models of every family as classic kTransformers' own modules, and as the GGUF files
that it reads.
"""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGUFWriter

from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.policy.profile import Link, MachineProfile, Side

needs_host = pytest.mark.skipif(
    find_spec("ktransformers") is None,
    reason="classic ktransformers has an environment of its own: make test-ktransformers",
)
RULES = Path(str(files("optimize_rules"))) / "ktransformers"

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "torch_dtype": "float32",
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "moe_intermediate_size": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "ep_size": 1,
    "seq_aux": True,
}
_GROUPS = {"q_lora_rank": 48, "n_group": 4, "topk_group": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Mixtral", {"num_local_experts": 8, "sliding_window": None}),
    "Qwen2-57B-A14B": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 256,
            "decoder_sparse_step": 1,
        }
        | {"shared_expert_intermediate_size": 128, "norm_topk_prob": False, "mlp_only_layers": []},
    ),
    "DeepSeek-V2": (
        "DeepseekV2",
        {**_MLA, **_GROUPS, "topk_method": "group_limited_greedy", "scoring_func": "softmax"}
        | {"routed_scaling_factor": 2.0, "norm_topk_prob": False},
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2",
        {
            **_MLA,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "n_shared_experts": 2,
        }
        | {"routed_scaling_factor": 1.0, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {
            **_MLA,
            **_GROUPS,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
        }
        | {"routed_scaling_factor": 2.5},
    ),
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
ARCHITECTURES = {
    "Mixtral": "llama",
    "Qwen2Moe": "qwen2moe",
    "DeepseekV2": "deepseek2",
    "DeepseekV3": "deepseek2",
}


def config(family: str, **changes: Any) -> Any:
    from ktransformers.models.configuration_deepseek import DeepseekV2Config
    from ktransformers.models.configuration_deepseek_v3 import DeepseekV3Config
    from transformers import MixtralConfig, Qwen2MoeConfig

    kind, values = FAMILIES[family]
    known = {
        "Mixtral": MixtralConfig,
        "Qwen2Moe": Qwen2MoeConfig,
        "DeepseekV2": DeepseekV2Config,
        "DeepseekV3": DeepseekV3Config,
    }
    made = known[kind](**{**_BASE, **values, **changes}, architectures=[f"{kind}ForCausalLM"])
    if kind in ("Mixtral", "Qwen2Moe"):
        made._attn_implementation = "flash_attention_2"  # as local_chat sets it
    return made


def skeleton(made: Any) -> Any:
    """The model's own class, built from its config on whatever device is the default."""
    from ktransformers import local_chat

    return local_chat.custom_models[made.architectures[0]](made).eval()


def model(family: str, seed: int = 0, **changes: Any) -> Any:
    """The family's own modules with plain torch experts and distinct random weights: the oracle."""
    built = skeleton(config(family, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in built.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("norm.weight") or "layernorm" in name:
                value.copy_(1 + 0.1 * noise)
            elif value.ndim == 1:
                value.copy_(0.1 * noise)
            else:
                value.copy_(noise * (0.5 if ".gate.weight" in name else value.shape[-1] ** -0.5))
    return built


def write(built: Any, folder: Path, *, tied: bool = False) -> Path:
    """Write a model's weights as `model.gguf` under the names that kTransformers looks for;
    float32.
    """
    from ktransformers.util.custom_gguf import translate_name_to_gguf

    folder.mkdir(parents=True, exist_ok=True)
    kind = built.config.architectures[0].removesuffix("ForCausalLM")
    arch, heads = (
        ARCHITECTURES[kind],
        (built.config.num_attention_heads, built.config.num_key_value_heads),
    )
    writer = GGUFWriter(str(folder / "model.gguf"), arch)
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, value in built.state_dict().items():
        array = value.detach().float().numpy()
        expert = re.search(r"^model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight$", name)
        if expert:
            part = {"w1": "gate", "w2": "down", "w3": "up"}.get(
                expert[3], expert[3].removesuffix("_proj")
            )
            experts.setdefault(f"blk.{expert[1]}.ffn_{part}_exps.weight", {})[int(expert[2])] = (
                array
            )
            continue
        if name == "lm_head.weight" and tied:
            continue
        if arch == "llama" and re.search(r"\.[qk]_proj\.", name):
            array = pairs(array, heads[0] if ".q_proj." in name else heads[1])
        if name.endswith(".shared_expert_gate.weight"):
            array = array[0]
        writer.add_tensor(gguf_name(name, translate_name_to_gguf), np.ascontiguousarray(array))
    for name, parts in experts.items():
        writer.add_tensor(name, np.stack([parts[index] for index in range(len(parts))]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def gguf_name(name: str, translate: Any) -> str:
    if name.endswith(".gate.e_score_correction_bias"):
        return f"blk.{name.split('.')[2]}.exp_probs_b.bias"
    return str(translate(name))


def pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K in the order of llama-architecture files."""
    return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def rules(family: str, folder: Path, variant: str = "cpu", **settings: Any) -> Path:
    """The packaged rules with settings added to the experts' kwargs; by default plain torch experts
    on the CPU.
    """
    parsed = yaml.safe_load((RULES / f"{family}-{variant}.yaml").read_text(encoding="utf-8"))
    for rule in parsed:
        if rule["replace"]["class"].endswith(".HybriMoEExperts"):
            rule["replace"]["kwargs"].update(
                {"cpu_backend": "torch", "profile": profile(folder), **settings}
            )
    path = folder / f"{family}-{variant}.yaml"
    path.write_text(yaml.safe_dump(parsed, sort_keys=False), encoding="utf-8")
    return path


def profile(folder: Path) -> str:
    """A machine on paper: measuring this one for every tiny shape would take most of the tests'
    time.
    """
    spec = ExpertSpec(64, 256, 8, 2, "F32", "F32", "F32", 65536, 65536, 65536)
    cpu, accelerator = Side(20.0, (1, 64), (100.0, 2000.0), 1), Side(10.0, (1, 64), (20.0, 40.0))
    made = MachineProfile(
        "tests", "assumed", "2026-11-24", spec, cpu, accelerator, Link(10.0, 5.0), 50.0
    )
    path = folder / "profile.json"
    path.write_text(made.to_json(), encoding="utf-8")
    return str(path)


def load(made: Any, rule_file: Path, folder: Path) -> Any:
    """A model by kTransformers' own `optimize_and_load_gguf`."""
    from ktransformers.optimize import optimize

    with torch.device("meta"):
        built = skeleton(made)
    optimize.optimize_and_load_gguf(built, str(rule_file), str(folder), made)
    return built.eval()


@torch.no_grad()
def host_logits(built: Any, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    """[1 + steps, V]: the last of a prefill of all but `steps` tokens, then of decoding those, one
    call each.

    The calls are those of `prefill_and_generate`.
    """
    from ktransformers.models.custom_cache import StaticCache

    first, device = prompt.shape[1] - steps, built.gguf_loader.tensor_device_map
    cache = StaticCache(built.config, 1, prompt.shape[1] + 3, device, dtype=torch.float32)
    found = []
    for start, end in [(0, first), *((at, at + 1) for at in range(first, prompt.shape[1]))]:
        position = torch.arange(start, end, dtype=torch.int32)
        out = built(
            inputs_embeds=built.model.embed_tokens(prompt[:, start:end]),
            position_ids=None if start == 0 else position[None],
            cache_position=position,
            past_key_values=cache,
            return_dict=False,
            use_cache=True,
        )
        if start:
            cache.change_seq_length(1)
        found.append(out[0][0, -1])
    return torch.stack(found)


@torch.no_grad()
def plain_logits(built: Any, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    """The same of the oracle: each in one pass over everything before it, without a cache."""
    found = []
    for count in range(prompt.shape[1] - steps, prompt.shape[1] + 1):
        # Its DeepSeek-V2 cannot be called with ids, nor without a mask, and gives the last token's
        # logits only.
        embedded, mask = built.model.embed_tokens(prompt[:, :count]), torch.ones(1, count)
        out = built(inputs_embeds=embedded, attention_mask=mask, use_cache=False, return_dict=True)
        found.append(out.logits[0, -1])
    return torch.stack(found)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (1, count), generator=torch.Generator().manual_seed(seed))
