"""Drafts by name, as the command line and scripts ask for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrimoe_plugin.errors import SpeculationError, did_you_mean
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model_of, rebuild_buffers
from lever_ext.drafts.base import Draft
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import LowBitExperts, LowBitLinear, low_bit_linears
from lever_ext.drafts.ngram import NGramDraft
from lever_ext.flash.format import Block
from lever_ext.flash.pack import Tensors
from lever_ext.packing import check_same_tokenizer
from lever_ext.target import FlashTarget, assign_tensors

DRAFTS = ("low-bit", "ngram", "none")
BITS, GROUP, HEAD_BITS = 3, 32, 4
"""Of a low-bit copy; on SmolLM2 it then agrees with the target in 53 % of greedy choices
(eval.lever).
"""


def make_draft(
    name: str, target: FlashTarget, tokenizer: Any, bits: int = BITS, group: int = GROUP
) -> Draft | None:
    """The draft of that name.

    Args:
        name: low-bit, ngram, none, or the path of a GGUF file.
        target: what it drafts for.
        tokenizer: of the target; a draft from a file must share it.
        bits: of a low-bit copy.
        group: input features of a low-bit copy that share a scale.

    Raises:
        SpeculationError: unknown name, another tokenizer, or experts without a low-bit copy.
        WeightsError: the file cannot be read.
        ConfigError: bits or group outside what is supported.
        FlashError: the pack cannot be read.
    """
    if name == "none":
        return None
    if name == "ngram":
        return NGramDraft()
    if name == "low-bit":
        return LanguageModelDraft(low_bit_of(target, bits, group), f"low-bit copy, {bits} bits")
    check_name(name)
    return _from_file(Path(name), tokenizer)


def check_name(name: str) -> None:
    """Check the name of a draft without making it.

    Raises:
        SpeculationError: no draft is called so, and there is no such file.
    """
    if name in DRAFTS or Path(name).exists():
        return
    hint = did_you_mean(name, DRAFTS)
    raise SpeculationError(
        f"--draft {name}: expected {', '.join(DRAFTS)} or the path of a GGUF, and there is no such "
        f"file{hint}"
    )


def low_bit_of(target: FlashTarget, bits: int = BITS, group: int = GROUP) -> Any:
    """A low-bit copy of a target, made layer by layer from its pack.

    The embedding is the target's own. The copy of a float16 target computes in bfloat16, for which
    there is a kernel.

    Raises:
        ConfigError: bits or group outside what is supported.
        FlashError: the pack cannot be read.
        SpeculationError: the experts are of a kind that has no low-bit copy.
    """
    pack, dtype = target.pack, target.model.dtype
    if dtype == torch.float16:
        dtype = torch.bfloat16
    model = meta_model_of(pack.config, dtype, "the pack's config")
    shared = {tensor.name for block in pack.blocks("resident") for tensor in block.tensors}
    assign_tensors(
        model, {name: p.data for name, p in target.model.named_parameters() if name in shared}
    )
    model.tie_weights()
    rebuild_buffers(model)
    head = model.get_output_embeddings().weight.detach()
    model.set_input_embeddings(SharedEmbedding(model.get_input_embeddings().weight.detach(), dtype))
    experts: dict[int, list[Block]] = {}
    for block in pack.blocks("expert"):
        experts.setdefault(block.layer, []).append(block)
    for block in pack.blocks("layer"):
        assign_tensors(model, pack.load(block))
        layer: Any = model.base_model.layers[block.layer]
        if block.layer in experts:
            pairs = (_gate_up_and_down(pack.load(expert)) for expert in experts[block.layer])
            activation = _gate_activation(layer, block.layer)
            layer.mlp.experts = LowBitExperts(pairs, activation, bits, group, dtype)
        low_bit_linears(layer, bits, group, dtype)
    model.set_output_embeddings(LowBitLinear(head, None, HEAD_BITS, group, dtype))
    for parameter in model.parameters():  # norms and routers; buffers keep the type they need
        parameter.data = parameter.data.to(dtype)
    return model.eval()


class SharedEmbedding(nn.Module):
    """An embedding over the weights of another model, which need not be of this model's type.

    Args:
        weight: [V, H], of any type; neither copied nor a parameter.
        dtype: of the results.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = weight
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., H] of token ids [...]."""
        return F.embedding(ids, self.rows).to(self.dtype)


def _gate_activation(layer: Any, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of a layer's experts, if they are a gate, up and down matrix and no more.

    Raises:
        SpeculationError: they are something else, or lie elsewhere in the layer.
    """
    experts: Any = getattr(getattr(layer, "mlp", None), "experts", None)
    activation = getattr(experts, "act_fn", None)
    usual = getattr(experts, "has_gate", False) and not (
        experts.has_bias or experts.is_transposed or not experts.is_concatenated
    )
    if activation is None or not usual:
        raise SpeculationError(
            f"layer {index} of {type(layer).__name__} has experts that the low-bit draft cannot "
            "copy: take --draft ngram or --draft none"
        )
    return activation


def _gate_up_and_down(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    down = next(name for name in tensors if name.endswith(".down_proj"))
    inner = next(name for name in tensors if name.endswith(".gate_up_proj"))
    return tensors[inner], tensors[down]


def _from_file(path: Path, tokenizer: Any) -> LanguageModelDraft:
    from hybrimoe_plugin.hosts.transformers import load_plain_model

    model, theirs = load_plain_model(None, path, progress=False)
    if theirs is None:
        raise SpeculationError(
            f"{path}: holds no tokenizer, so it is unknown whether it shares the target's"
        )
    check_same_tokenizer(tokenizer, theirs)
    return LanguageModelDraft(model, path.name)
