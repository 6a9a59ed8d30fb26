"""The matrices that a token reads, by type and shape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.device.memory import huge_pages
from hybrimoe_plugin.weights.gguf_header import TensorInfo
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.layer_weights import chosen_experts
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_EXPERTS = "_exps."


class Kind(NamedTuple):
    """Matrices of one type and shape."""

    parts: tuple[str, ...]
    """What the file calls them, without their layers: `attn_q`, `ffn_gate_exps`, ..."""
    type_name: str
    shape: tuple[int, int]
    """Of one matrix: [N, M]."""
    tensors: tuple[TensorInfo, ...]
    """Those that hold them, one matrix or a stack [E, N, M] each."""
    per_token: int
    """Matrices that a token reads."""

    @property
    def are_experts(self) -> bool:
        """Whether all of them are routed experts."""
        return all(_EXPERTS in info.name for info in self.tensors)

    @property
    def matrix_bytes(self) -> int:
        """Of one matrix as stored."""
        first = self.tensors[0]
        return first.nbytes // _matrices(first)


def kinds(store: GGUFStore, config: Any) -> list[Kind]:
    """What a token reads: all dense matrices, K of each layer's experts, and the head.

    Raises:
        ConfigError: there are experts, and the config does not say how many a token takes.
    """
    grouped: dict[tuple[str, tuple[int, int]], list[TensorInfo]] = {}
    for info in store.tensors.values():
        if _is_read(store, info):
            rows, columns = info.shape[-2:]
            grouped.setdefault((info.type_name, (rows, columns)), []).append(info)
    return [
        Kind(
            tuple(dict.fromkeys(_part(info.name) for info in infos)),
            type_name,
            shape,
            tuple(infos),
            sum(
                chosen_experts(config) if _EXPERTS in info.name else _matrices(info)
                for info in infos
            ),
        )
        for (type_name, shape), infos in grouped.items()
    ]


def streamed(store: GGUFStore, kind: Kind, least_bytes: int, most: int) -> list[QuantizedMatrix]:
    """Copies of a kind's matrices one behind the other in memory, as operators' matrices lie.

    The file's are taken in turn, again and again where it has fewer, until `least_bytes` are there,
    which should be more than caches hold, or `most` matrices.
    """
    size = kind.matrix_bytes
    count = min(-(-least_bytes // size), most)
    memory = np.frombuffer(huge_pages(count * size), np.uint8)
    views = [memory[start : start + size] for start in range(0, count * size, size)]
    for view, stored in zip(views, cycle(_stored(store, kind)), strict=False):
        view[:] = stored
    return [QuantizedMatrix(view, kind.type_name, kind.shape) for view in views]


def _stored(store: GGUFStore, kind: Kind) -> Iterator[NDArray[np.uint8]]:
    """The bytes of each matrix in the file."""
    for info in kind.tensors:
        yield from store.raw(info.name).reshape(_matrices(info), -1)


def _is_read(store: GGUFStore, info: TensorInfo) -> bool:
    if info.name == _EMBEDDING:  # one row of it, unless it is the head too
        return _HEAD not in store.tensors
    return len(info.shape) > 1 and info.name.endswith(".weight")


def _matrices(info: TensorInfo) -> int:
    return int(np.prod(info.shape[:-2], dtype=int))


def _part(name: str) -> str:
    return "head" if name in (_EMBEDDING, _HEAD) else re.sub(r"^blk\.\d+\.|\.weight$", "", name)
