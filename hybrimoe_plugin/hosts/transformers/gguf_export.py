"""Writes a transformers model as GGUF: for demo and test models, the reverse of loading one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_metadata import metadata
from hybrimoe_plugin.families.gguf_rope_written import rope_tensors
from hybrimoe_plugin.families.registry import family_of
from hybrimoe_plugin.weights.gguf_names import (
    EXPERTS,
    GATE_UP,
    GATE_UP_BIAS,
    GGUFNames,
    NameMap,
    layer_number,
)

ChooseType = Callable[[str], str]
"""GGUF tensor name -> GGML type name."""

_KV_B = ".self_attn.kv_b_proj.weight"


def export_gguf(
    model: Any,
    path: str | Path,
    *,
    types: ChooseType | str = "F32",
    stacked: bool = True,
    split_kv_b: bool = False,
    extra: Mapping[str, Any] | None = None,
    shard_tensors: int = 0,
) -> None:
    """Write config metadata and all weights of a model.

    Args:
        model: of a known family.
        path: the file to write.
        types: GGML type of each matrix, by GGUF name or one for all; vectors stay F32. Only what
            `gguf` can quantise.
        stacked: experts as `ffn_*_exps`; False gives each a tensor of its own, as old files do.
        split_kv_b: store DeepSeek's kv_b as `attn_k_b` and `attn_v_b`.
        extra: further metadata: strings, numbers, booleans and lists of them.
        shard_tensors: tensors per file of a split set; 0 writes one file.

    Raises:
        WeightsError: the config asks for what a file cannot say, or a parameter has no GGUF name.
        ConfigError: the model is of no known family.
    """
    family = family_of(model.config.model_type)
    writer = GGUFWriter(str(path), family.architectures[0], split_max_tensors=shard_tensors)
    keys = {**metadata(model.config, family), **(extra or {})}
    for key, value in keys.items():
        add_value(writer, key, value)
    for name, value in tensors(model, family, stacked, split_kv_b).items():
        kind = "F32"
        if value.ndim > 1:
            kind = types(name) if callable(types) else types
        _add_tensor(writer, name, value, GGMLQuantizationType[kind])
    finish(writer)


def tensors(
    model: Any, family: Family, stacked: bool = True, split_kv_b: bool = False
) -> dict[str, torch.Tensor]:
    """GGUF name -> value in GGUF's layout.

    Raises:
        WeightsError: a parameter has no GGUF name.
    """
    config = model.config
    names = NameMap(family.names, family.architectures[0], config.num_hidden_layers)
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        joined = family.names.joined_tensors(name)
        if name.endswith(EXPERTS):
            found.update(_experts(name, value, stacked, family.names))
        elif joined:
            value = family.names.as_stored(name, value, config)
            sizes = family.names.sizes_of_joined(name, value, config)
            found.update(zip(joined, value.split(sizes), strict=True))
        elif split_kv_b and name.endswith(_KV_B):
            found.update(_split_kv_b(name, value, config))
        else:
            found[_tensor_of(name, names)] = family.names.as_stored(name, value, config)
    return {**found, **rope_tensors(config)}


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Write a string, number, boolean, or a list or array of them."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, np.ndarray):
        writer.add_array(key, value.tolist())
    else:
        writer.add_array(key, list(value))


def finish(writer: GGUFWriter) -> None:
    """Write everything that was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(
    writer: GGUFWriter, name: str, value: torch.Tensor, kind: GGMLQuantizationType
) -> None:
    array = value.detach().float().contiguous().numpy()
    if kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)


def _tensor_of(name: str, names: NameMap) -> str:
    found = names.tensor(name)
    if found is None:
        raise WeightsError(f"parameter {name!r} has no GGUF name")
    return found


def _experts(
    name: str, value: torch.Tensor, stacked: bool, names: GGUFNames
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a layer's experts, from a parameter that stacks them."""
    layer = f"blk.{layer_number(name)}"
    interleaved = names.interleaved_experts
    if interleaved and value.ndim == 3:
        value = value.transpose(1, 2)
    kind = "bias" if name.endswith("_bias") else "weight"
    if names.fused_experts and name.endswith(GATE_UP):
        parts = {f"{layer}.ffn_gate_up": value}
    elif name.endswith((GATE_UP, GATE_UP_BIAS)):
        gate, up = (value[:, ::2], value[:, 1::2]) if interleaved else value.chunk(2, dim=1)
        parts = {f"{layer}.ffn_gate": gate, f"{layer}.ffn_up": up}
    else:
        parts = {f"{layer}.ffn_down": value}
    for part, matrices in parts.items():
        if stacked or kind == "bias" or names.fused_experts:
            yield f"{part}_exps.{kind}", matrices
            continue
        for expert, matrix in enumerate(matrices):
            yield f"{part}.{expert}.weight", matrix


def _split_kv_b(name: str, value: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    layer = f"blk.{layer_number(name)}"
    heads = value.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    sizes = (config.qk_nope_head_dim, config.v_head_dim)
    keys, values = heads.split(sizes, dim=1)
    return {
        f"{layer}.attn_k_b.weight": keys.transpose(1, 2),
        f"{layer}.attn_v_b.weight": values,
    }
