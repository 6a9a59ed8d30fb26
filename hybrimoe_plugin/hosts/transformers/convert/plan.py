"""What a converted file holds: the GGUF tensors, each with the rows that it is made from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_metadata import metadata
from hybrimoe_plugin.families.gguf_rope_written import rope_tensors
from hybrimoe_plugin.families.registry import find_family
from hybrimoe_plugin.hosts.files import read_json
from hybrimoe_plugin.hosts.transformers.checkpoint.files import weight_files
from hybrimoe_plugin.hosts.transformers.checkpoint.names import CheckpointNames
from hybrimoe_plugin.hosts.transformers.convert.experts import turned_experts
from hybrimoe_plugin.hosts.transformers.convert.methods import Source, method_of, sources
from hybrimoe_plugin.hosts.transformers.convert.pieces import (
    Changed,
    Computed,
    Piece,
    Written,
)
from hybrimoe_plugin.hosts.transformers.directory import config_of
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model
from hybrimoe_plugin.weights.gguf_header import TensorInfo
from hybrimoe_plugin.weights.gguf_names import NameMap
from hybrimoe_plugin.weights.safetensors_store import SafetensorsStore

WRITTEN = ("BF16", "F16", "F32", "MXFP4", "Q8_0", "Q4_0", "Q4_1")
_EXPERT = re.compile(r"^(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight$")


class Plan(NamedTuple):
    """A whole file."""

    architecture: str
    metadata: Mapping[str, Any]
    tensors: tuple[Written, ...]
    store: SafetensorsStore
    model: Any
    """Without weights."""


def plan(directory: str | Path, fp8: str) -> Plan:
    """What converting a model directory would write; nothing is read but headers and scales.

    Args:
        fp8: GGML type for FP8: Q8_0 or BF16.

    Raises:
        WeightsError: the checkpoint is not sound, of a method or a form that is not read.
        ConfigError: no known family.
    """
    folder = Path(directory)
    values = read_json(folder / "config.json")
    config = config_of(values, str(folder / "config.json"))
    family = find_family(config.model_type)
    if family is None:
        raise ConfigError(
            f"{folder}: how GGUF files store {config.model_type} is not known here, so it cannot "
            "be converted: take a checkpoint in BF16, F16 or F32, which --model_path reads as it is"
        )
    _check_names(family, folder)
    model = meta_model(config)
    method = method_of(values, fp8, str(folder))
    files, _ = weight_files(folder)
    store = SafetensorsStore(folder, files)
    found = list(sources(store, method))
    tensors = tuple(_tensors(found, model, family, str(folder)))
    return Plan(family.architectures[0], metadata(config, family), tensors, store, model)


def _check_names(family: Family, folder: Path) -> None:
    """Raise WeightsError for a family whose files deviate in a way that is not written here."""
    if family.names.fused_experts:
        raise WeightsError(
            f"{folder}: GGUF files of {family.model_type} store experts' gate and up in one "
            "tensor, which convert does not write: take a GGUF file made by llama.cpp"
        )


def _tensors(found: list[Source], model: Any, family: Family, where: str) -> Iterator[Written]:
    config = model.config
    names = NameMap(family.names, family.architectures[0], config.num_hidden_layers)
    parameters = model.state_dict()
    experts: dict[str, dict[int, Piece]] = {}
    found, turned = turned_experts(found, model, where)
    yield from turned
    for view in CheckpointNames(model, where, WRITTEN).views(map(_info, found, range(len(found)))):
        source = found[view.file]
        piece = Piece(source, *_rows(view, source))
        single = _EXPERT.match(view.name)
        if single is not None:
            experts.setdefault(f"{single[1]}_exps.weight", {})[int(single[2])] = piece
            continue
        if view.name.startswith("blk."):
            yield Written(view.name, source.type_name, view.shape, (piece,))
            continue
        if view.name == "lm_head.weight" and config.tie_word_embeddings:
            raise WeightsError(f"{where}: holds a head, which the config says is the embedding")
        if view.name not in parameters:
            raise WeightsError(
                f"{where}: a {config.model_type} model has no place for {view.name!r}"
            )
        yield from _own(piece, view, family, names, model, where)
    for name, pieces in experts.items():
        yield _stack(name, pieces, where)
    for name, value in rope_tensors(config).items():
        yield Written(name, "F32", tuple(value.shape), (Computed(value),))


def _info(source: Source, number: int) -> TensorInfo:
    nbytes = math.prod(source.shape[:-1]) * source.row_bytes
    return TensorInfo(source.name, source.type_name, source.shape, nbytes, 0, number)


def _rows(view: TensorInfo, source: Source) -> tuple[int, int]:
    """First row and number of rows of a view of a source."""
    return view.offset // source.row_bytes, view.nbytes // source.row_bytes


def _own(
    piece: Piece, view: TensorInfo, family: Family, names: NameMap, model: Any, where: str
) -> Iterator[Written]:
    """A parameter that is no expert's: one tensor in GGUF files too, or several that it joins."""
    parameter, config = view.name, model.config
    joined = family.names.joined_tensors(parameter)
    name = names.tensor(parameter)
    if name is None and not joined:
        raise WeightsError(f"{where}: parameter {parameter!r} has no GGUF name")
    if len(view.shape) < 2 or family.names.change(parameter) is not None:
        assert name is not None, "no family changes values of what it joins"
        yield _changed(name, piece.source, parameter, family, config)
        return
    order = family.names.as_stored(parameter, torch.arange(piece.rows), config).numpy()
    if not joined:
        yield Written(str(name), view.type_name, view.shape, (piece._replace(order=order),))
        return
    sizes = family.names.sizes_of_joined(parameter, model.state_dict()[parameter], config)
    for part, size, end in zip(joined, sizes, np.cumsum(sizes), strict=True):
        rows = piece._replace(rows=size, order=order[end - size : end])
        yield Written(part, view.type_name, (size, view.shape[-1]), (rows,))


def _changed(name: str, source: Source, parameter: str, family: Family, config: Any) -> Written:
    """A vector, or a parameter whose values files have in another form: matrices in BF16."""

    def stored(value: torch.Tensor) -> torch.Tensor:
        return family.names.as_stored(parameter, value, config)

    shape = tuple(stored(torch.empty(source.shape, device="cpu")).shape)
    dtype = torch.bfloat16 if len(source.shape) == 2 else torch.float32
    kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    return Written(name, kind, shape, (Changed(source, stored, dtype),))


def _stack(name: str, pieces: Mapping[int, Piece], where: str) -> Written:
    """All experts of a layer's projection as one tensor."""
    ordered = [pieces.get(expert) for expert in range(len(pieces))]
    kinds = {piece.source.type_name for piece in ordered if piece is not None}
    if None in ordered:
        raise WeightsError(f"{where}: an expert of {name!r} is missing")
    if len(kinds) > 1:
        raise WeightsError(f"{where}: the experts of {name!r} are of types {sorted(kinds)}")
    whole = tuple(piece for piece in ordered if piece is not None)
    shape = _expert_shape(whole)
    return Written(name, kinds.pop(), (len(whole), *shape), whole)


def _expert_shape(pieces: Iterable[Piece]) -> tuple[int, int]:
    shapes = {(piece.rows, piece.source.shape[-1]) for piece in pieces}
    if len(shapes) > 1:
        raise WeightsError(f"experts of one layer have shapes {sorted(shapes)}")
    return shapes.pop()
