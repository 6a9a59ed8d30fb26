"""What became of kTransformers' classes and arguments: for rules written for versions 0.2 to 0.4.

One table, read by the errors about such rules, by their translation and by docs/ktransformers.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

PACKAGE = "ktransformers."
_OURS = "hybrimoe_plugin.operators"


class Fate(Enum):
    """What becomes of a rule with such a class."""

    OPERATOR = "write"
    AUTOMATIC = "leave out"
    REFUSED = "not supported"


@dataclass(frozen=True)
class Moved:
    """Some of kTransformers' operators that share their fate.

    Attributes:
        module: theirs, below `ktransformers.operators`.
        names: classes of it; none stands for the whole module.
        fate: what becomes of rules that name them.
        text: our operator's dotted path, or why there is none.
        since: first version that has them all.
    """

    module: str
    names: tuple[str, ...]
    fate: Fate
    text: str
    since: str = "0.2.1"

    @property
    def advice(self) -> str:
        """What to do with a rule that names one of them."""
        if self.fate is Fate.OPERATOR:
            return f"write {self.text}"
        if self.fate is Fate.AUTOMATIC:
            return f"leave the rule out: {self.text}"
        return f"not supported here: {self.text}"


_BLOCK = "the model's own block calls the experts' operator"
_ROUTER = "the model's own router is used, and shown to the engine"
_LINEAR = f"{_OURS}.linear.QuantizedLinear"
_GQA = f"{_OURS}.attention.FusedAttention"
_MLA = f"{_OURS}.mla.FusedMLA"
_NORM = f"{_OURS}.norm.FusedRMSNorm"
_MLP = f"{_OURS}.mlp.FusedMLP"
_ROTARY = "the model computes its rotary embeddings itself"
_LAYERS = "every layer follows its experts' device, and long prompts are computed in pieces"
_LONG = "attention over long contexts on the CPU, for dense models"
_INTEL = "Intel GPUs"
_FAMILY = "GLM-4-MoE, SmallThinker and Qwen3-Next are no families of this project"

OPERATORS = (
    Moved(
        "experts",
        ("KTransformersExperts",),
        Fate.OPERATOR,
        f"{_OURS}.experts.HybriMoEExperts",
    ),
    Moved(
        "experts",
        ("KTransformersExpertsV2",),
        Fate.OPERATOR,
        f"{_OURS}.experts.HybriMoEExperts",
        "0.2.4",
    ),
    Moved(
        "experts",
        (
            "KDeepseekV2MoE",
            "KDeepseekV3MoE",
            "KQwen2MoeSparseMoeBlock",
            "KMistralSparseMoEBlock",
        ),
        Fate.AUTOMATIC,
        _BLOCK,
    ),
    Moved("experts", ("KDeepseekV3MoEV2",), Fate.AUTOMATIC, _BLOCK, "0.2.4"),
    Moved(
        "experts",
        ("KQwen2MoeSparseMoeBlockV2", "KQwen3MoeSparseMoeBlockV2"),
        Fate.AUTOMATIC,
        _BLOCK,
        "0.3",
    ),
    Moved("gate", ("KMoEGate",), Fate.AUTOMATIC, _ROUTER),
    Moved("gate", ("KMoEGateQwen2Moe",), Fate.AUTOMATIC, _ROUTER, "0.3"),
    Moved("linear", ("KTransformersLinear",), Fate.OPERATOR, _LINEAR),
    Moved("attention", ("KDeepseekV2Attention",), Fate.OPERATOR, _MLA),
    Moved("attention", ("flashinfer_attn",), Fate.OPERATOR, _MLA, "0.2.4"),
    Moved("balance_serve_attention", ("flashinfer_attn",), Fate.OPERATOR, _MLA, "0.3"),
    Moved("balance_serve_attention", ("deepseek_torch_attn",), Fate.OPERATOR, _MLA, "0.3.1"),
    Moved(
        "balance_serve_attention",
        ("KQwen2MoeAttention", "KQwen3MoeAttention"),
        Fate.OPERATOR,
        _GQA,
        "0.3",
    ),
    Moved(
        "RoPE",
        (
            "RotaryEmbedding",
            "RotaryEmbeddingV2",
            "RotaryEmbeddingV3",
            "YarnRotaryEmbedding",
            "YarnRotaryEmbeddingV3",
            "DynamicNTKScalingRotaryEmbedding",
        ),
        Fate.AUTOMATIC,
        _ROTARY,
    ),
    Moved("RoPE", ("RotaryEmbeddingV4",), Fate.AUTOMATIC, _ROTARY, "0.2.4"),
    Moved("RoPE", ("KQwen3MoeRotaryEmbedding",), Fate.AUTOMATIC, _ROTARY, "0.3"),
    Moved("layernorm", ("RMSNorm",), Fate.OPERATOR, _NORM, "0.2.4"),
    Moved("layernorm", ("KQwen2MoeRMSNorm", "KQwen3MoeRMSNorm"), Fate.OPERATOR, _NORM, "0.3"),
    Moved("layernorm", ("DeepseekV3RMSNormTorch",), Fate.OPERATOR, _NORM, "0.3.1"),
    Moved("mlp", ("kDeepseekV3MLP",), Fate.OPERATOR, _MLP, "0.2.4"),
    Moved("mlp", ("KQwen2MoeMLP",), Fate.OPERATOR, _MLP, "0.3"),
    Moved("models", ("KDeepseekV2Model", "KQwen2MoeModel"), Fate.AUTOMATIC, _LAYERS),
    Moved("models", ("KLlamaModel",), Fate.REFUSED, _LONG),
    Moved("attention", ("KLlamaAttention",), Fate.REFUSED, _LONG),
    Moved("gate", ("KMoEGateIPEXLLM",), Fate.REFUSED, _INTEL, "0.3.1"),
    Moved("layernorm", ("KDeepseekRMSNormIPEXLLM",), Fate.REFUSED, _INTEL, "0.3.1"),
    Moved("attention", ("KQwen3MoeAttentionIPEXLLM",), Fate.REFUSED, _INTEL, "0.3.2"),
    Moved("ascend", (), Fate.REFUSED, "Ascend NPUs", "0.4.1"),
    Moved(
        "experts",
        (
            "KGlm4Experts",
            "KGlm4MoeMoE",
            "KSmallthinkerExperts",
            "KSmallthinkerMoeBlock",
            "KQwen3NextSparseMoeBlockV2",
        ),
        Fate.REFUSED,
        _FAMILY,
        "0.4.1",
    ),
    Moved(
        "balance_serve_attention",
        (
            "KGlm4MoeAttention",
            "KSmallthinkerAttention",
            "KQwen3NextAttention",
            "KQwen3NextGatedDeltaNet",
        ),
        Fate.REFUSED,
        _FAMILY,
        "0.4.1",
    ),
    Moved(
        "RoPE",
        ("KGlm4MoeRotaryEmbedding", "KSmallthinkerRotaryEmbedding"),
        Fate.REFUSED,
        _FAMILY,
        "0.4.1",
    ),
    Moved(
        "layernorm",
        ("KGlm4MoeRMSNorm", "KSmallthinkerRMSNorm", "KQwen3NextRMSNorm"),
        Fate.REFUSED,
        _FAMILY,
        "0.4.1",
    ),
    Moved(
        "mlp",
        ("KGlm4MoeMLP", "KSmallthinkerDenseMlpBlock"),
        Fate.REFUSED,
        _FAMILY,
        "0.4.1",
    ),
)

KWARGS: Mapping[str, str] = MappingProxyType(
    {
        "out_device": "the experts' prefill_device and generate_device say where their layer is",
        "generate_op": "the engine chooses for every call; cpu_backend and dense choose kernels",
        "prefill_op": "the engine chooses for every call; cpu_backend and dense choose kernels",
        "backend": "cpu_backend chooses the CPU's kernels; experts are computed as stored in the "
        "GGUF file, which AMXInt8 and AMXBF16 convert",
        "transfer_map": "hidden states move where the experts' device changes",
        "per_layer_prefill_intput_threshold": "the engine plans prompts too",
        "absorb_for_prefill": "the operator chooses",
        "chunck_size": "chunk_prefill_size of the chat computes long prompts in pieces",
    }
)
"""Argument of their operators -> what takes its place; ours do not take these."""

MODELS: Mapping[str, str] = MappingProxyType(
    {
        "modeling_deepseek": "deepseek_v2",
        "modeling_deepseek_v3": "deepseek_v3",
        "modeling_mixtral": "mixtral",
        "modeling_qwen2_moe": "qwen2_moe",
        "modeling_qwen3_moe": "qwen3_moe",
    }
)
"""Module of `ktransformers.models` -> model type in current transformers, for families known here.
"""

BLOCKS: Mapping[str, str] = MappingProxyType(
    {
        "KDeepseekV2MoE": "deepseek_v2",
        "KDeepseekV3MoE": "deepseek_v3",
        "KDeepseekV3MoEV2": "deepseek_v3",
        "KMistralSparseMoEBlock": "mixtral",
        "KQwen2MoeSparseMoeBlock": "qwen2_moe",
        "KQwen2MoeSparseMoeBlockV2": "qwen2_moe",
        "KQwen3MoeSparseMoeBlockV2": "qwen3_moe",
    }
)
"""Their MoE block -> the model type that it is made for."""


def find_moved(path: str) -> Moved | None:
    """The row of a dotted class path; None for operators that no released rules name."""
    below = path.removeprefix(f"{PACKAGE}operators.")
    if below == path:
        return None
    module, _, name = below.rpartition(".")
    for row in OPERATORS:
        whole = not row.names and f"{module}.".startswith(f"{row.module}.")
        if whole or (module == row.module and name in row.names):
            return row
    return None


def advice_on(path: str) -> str | None:
    """What to write instead of a class of kTransformers; None for any that is not known here."""
    row = find_moved(path)
    if row is not None:
        return row.advice
    kind = MODELS.get(path.removeprefix(f"{PACKAGE}models.").partition(".")[0])
    if kind is None:
        return None
    return f"the model's classes are in transformers.models.{kind}.modeling_{kind}"
