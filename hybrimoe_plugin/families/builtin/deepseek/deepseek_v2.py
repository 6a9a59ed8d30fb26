"""DeepSeek-V2, V2.5 and Coder-V2: latent attention, groups of experts chosen by a softmax."""

from __future__ import annotations

from typing import Any, NamedTuple

from hybrimoe_plugin.families.family import Family, LayerForm, PackagedRules
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import Draft, has_biases, read_common, read_experts

SIGMOID = 2
"""The gating function that came with DeepSeek-V3; 0 and 1 are softmax."""


class _Groups(NamedTuple):
    """Groups of experts."""

    total: int
    chosen: int
    """How many of them a token may choose experts from."""


_RELEASED = {
    # (experts, how many a token gets, whether by a sigmoid)
    (160, 6, False): _Groups(8, 3),  # V2, V2.5, Coder-V2
    (256, 8, True): _Groups(8, 4),  # V3, R1
}
"""Released models with groups of experts, which older converters left out of the file."""


_KIMI_EXPERTS = 384


def gating(facts: Facts) -> int:
    """The gating function; files without the key are older, and of a softmax."""
    return facts.integer("expert_gating_func", 0)


def read_deepseek(facts: Facts, draft: Draft, complete: bool = False) -> int:
    """What V2 and V3 share; gives the number of groups of experts.

    Args:
        complete: whether files have always stated how experts are grouped.
    """
    read_common(facts, draft)
    # Files with split kv_b describe multi-query attention; the model itself has one key head per
    # query head.
    draft.stated.pop("num_key_value_heads", None)
    draft.assumed["num_key_value_heads"] = draft.stated["num_attention_heads"]
    _read_latent_heads(facts, draft)
    used = read_experts(facts, draft, "n_routed_experts")
    _note_ramp(facts, draft)
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
    expert = facts.integer("expert_feed_forward_length", least=1)
    shared = facts.integer("expert_shared_count")
    draft.take("moe_intermediate_size", expert)
    draft.take("n_shared_experts", shared)
    facts.only(
        "expert_shared_feed_forward_length",
        shared * expert,
        f"{shared * expert} is what its experts give",
        unset=0,
    )
    dense = facts.integer("leading_dense_block_count", 0)
    draft.take("first_k_dense_replace", dense, "leading_dense_block_count")
    scale = facts.number("expert_weights_scale", 1.0)
    draft.take("routed_scaling_factor", scale, "expert_weights_scale")
    groups = _read_groups(facts, draft, used, complete)
    draft.take("n_group", groups.total, "expert_group_count")
    draft.take("topk_group", groups.chosen, "expert_group_used_count")
    return groups.total


def _read_latent_heads(facts: Facts, draft: Draft) -> None:
    rope = facts.integer("rope.dimension_count", least=1)
    # Where there are lengths for latent attention, the others are those of the absorbed form.
    key = facts.integer("attention.key_length", 0)
    key = facts.integer("attention.key_length_mla", key, least=1)
    value = facts.integer("attention.value_length", 0)
    value = facts.integer("attention.value_length_mla", value, least=1)
    if key <= rope:
        raise facts.wrong(
            "rope.dimension_count",
            f"it must be less than the keys' length, which is {key}",
            rope,
        )
    rank = None
    with_bias = ["attn_kv_a_mqa", "attn_output"]
    if facts.has("attention.q_lora_rank"):
        rank = facts.integer("attention.q_lora_rank", least=1)
        with_bias.append("attn_q_a")
    draft.take("q_lora_rank", rank, "attention.q_lora_rank")
    draft.take("kv_lora_rank", facts.integer("attention.kv_lora_rank", least=1))
    draft.take("qk_rope_head_dim", rope)
    draft.take("qk_nope_head_dim", key - rope)
    draft.take("v_head_dim", value)
    draft.assumed["attention_bias"] = has_biases(facts, *with_bias)
    draft.rope_width = rope


def _note_ramp(facts: Facts, draft: Draft) -> None:
    """Kimi-K2's first release has a ramp of its own, which older converters left out."""
    stated = facts.has("rope.scaling.yarn_beta_fast")
    if draft.stated["n_routed_experts"] == _KIMI_EXPERTS and not stated:
        draft.notices.append(
            "it does not state where the ramp of its rotary embedding begins (yarn_beta_fast): 32 "
            "is taken, and Kimi-K2's first release has 1; give its config.json with --model_path"
        )


def _read_groups(facts: Facts, draft: Draft, used: int, complete: bool) -> _Groups:
    experts = draft.stated["n_routed_experts"]
    released = _RELEASED.get((experts, used, gating(facts) == SIGMOID))
    stated = facts.has("expert_group_count") or facts.has("expert_group_used_count")
    if released is not None and not stated and not complete:
        draft.notices.append(
            "it does not state how its experts are grouped: a token chooses from "
            f"{released.chosen} of {released.total} groups, as in DeepSeek's released model of "
            "this size; give its config.json with --model_path if this is another model"
        )
        return released
    groups = facts.integer("expert_group_count", 1) or 1
    chosen = facts.integer("expert_group_used_count", 1) or 1
    if experts % groups:
        why = f"it must divide expert_count, which is {experts}"
        raise facts.wrong("expert_group_count", why, groups)
    if chosen > groups:
        why = f"there are expert_group_count = {groups}"
        raise facts.wrong("expert_group_used_count", why, chosen)
    room = chosen * (experts // groups)
    if used > room:
        why = f"{chosen} of {groups} groups hold {room} experts"
        raise facts.wrong("expert_used_count", why, used)
    return _Groups(groups, chosen)


def deepseek_metadata(config: Any, gating: int, dense: int) -> dict[str, Any]:
    """The reverse of `read_deepseek`; `dense` layers come before those with experts."""
    values = {
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": dense,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": gating,
    }
    if config.q_lora_rank is not None:
        values["attention.q_lora_rank"] = config.q_lora_rank
    if config.n_group is not None:
        values["expert_group_count"] = config.n_group
        values["expert_group_used_count"] = config.topk_group
    return values


def _holds(facts: Facts) -> bool:
    return gating(facts) != SIGMOID


def _describe(facts: Facts, draft: Draft) -> None:
    groups = read_deepseek(facts, draft)
    if gating(facts) not in (0, 1):
        facts.refuse(f"{facts.architecture}.expert_gating_func is {gating(facts)}")
    facts.only(
        "expert_weights_norm",
        False,
        "transformers' DeepSeek-V2 does not normalise expert weights",
    )
    draft.take("norm_topk_prob", False, "expert_weights_norm")
    draft.assumed["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"


def _metadata(config: Any) -> dict[str, Any]:
    return deepseek_metadata(config, gating=1, dense=config.first_k_dense_replace)


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architectures=("deepseek2",),
    describe=_describe,
    holds=_holds,
    metadata=_metadata,
    yarn_mscale=True,
    # vLLM scales the residual stream of this model down in float16, against overflow.
    wide_activations=True,
    rules=PackagedRules(
        engine="DeepSeek-V2.yaml",
        classic="ktransformers/DeepSeek-V2-{device}.yaml",
    ),
    model_class="DeepseekV2ForCausalLM",
    layers=LayerForm.MOE,
    usual_split="deepseek-llm",
)
