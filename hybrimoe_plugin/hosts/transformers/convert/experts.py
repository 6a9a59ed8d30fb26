"""Experts that transformers turns when it dequantises them, and their biases.

The model has its matrices as [E, H, 2I] and [E, I, H], with columns of gate and up in turns. The
quantised checkpoint has their rows of outputs, as GGUF files do, so that only the turns are undone:

    rows of gate_up  g0 u0 g1 u1 ...  ->  ffn_gate_exps  g0 g1 ...    ffn_up_exps  u0 u1 ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.convert.methods import Source
from hybrimoe_plugin.hosts.transformers.convert.pieces import Biases, Piece, Written
from hybrimoe_plugin.weights.gguf_names import DOWN, GATE_UP, layer_number

_BIASES = (f"{GATE_UP}_bias", f"{DOWN}_bias")


def turned_experts(
    found: Sequence[Source], model: Any, where: str
) -> tuple[list[Source], list[Written]]:
    """(the other sources, what is written of such experts).

    Raises:
        WeightsError: a shape is not the one that the config asks for.
    """
    parameters = model.state_dict()
    others: list[Source] = []
    written: list[Written] = []
    for source in found:
        parameter = parameters.get(source.name)
        if parameter is None or not _is_turned(source, model):
            others.append(source)
            continue
        _check_shape(source, tuple(parameter.shape), where)
        written += _biases(source) if source.name.endswith(_BIASES) else _matrices(source)
    return others, written


def _is_turned(source: Source, model: Any) -> bool:
    if not source.name.endswith((GATE_UP, DOWN, *_BIASES)):
        return False
    module = model.get_submodule(source.name.rpartition(".")[0])
    if not getattr(module, "is_transposed", False) or getattr(module, "is_concatenated", True):
        return False
    # Matrices in floating point would have to be turned; the usual way refuses them.
    return source.type_name == "MXFP4" or source.name.endswith(_BIASES)


def _check_shape(source: Source, wanted: tuple[int, ...], where: str) -> None:
    if len(wanted) == 3:
        wanted = (wanted[0], wanted[2], wanted[1])
    if source.shape != wanted:
        raise WeightsError(
            f"{where}: {source.name!r} has shape {source.shape}, the model's config asks for "
            f"{wanted}"
        )


def _matrices(source: Source) -> Iterator[Written]:
    experts, rows, columns = source.shape
    layer = f"blk.{layer_number(source.name)}"
    if source.name.endswith(DOWN):
        piece = Piece(source, 0, experts * rows)
        yield Written(f"{layer}.ffn_down_exps.weight", source.type_name, source.shape, (piece,))
        return
    # An expert has as many rows of gate as of up, so the turns go on from one to the next.
    for first, part in enumerate(("gate", "up")):
        piece = Piece(source, first, experts * rows // 2, step=2)
        shape = (experts, rows // 2, columns)
        yield Written(f"{layer}.ffn_{part}_exps.weight", source.type_name, shape, (piece,))


def _biases(source: Source) -> Iterator[Written]:
    experts, rows = source.shape
    layer = f"blk.{layer_number(source.name)}"
    if source.name.endswith(_BIASES[1]):
        shape = (experts, rows)
        yield Written(f"{layer}.ffn_down_exps.bias", "F32", shape, (Biases(source, 0, 1),))
        return
    for first, part in enumerate(("gate", "up")):
        shape = (experts, rows // 2)
        yield Written(f"{layer}.ffn_{part}_exps.bias", "F32", shape, (Biases(source, first, 2),))
