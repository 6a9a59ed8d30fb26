"""CPU experts as ggml graphs, for any GGML type and shape.

Where nothing else computes meanwhile they run on the caller's own threads, the same OpenMP threads
as torch's, so that no two pools fight for the cores. Beside an accelerator they run on a worker
thread, with its own OpenMP team.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from hybrimoe_plugin.compute.cpu.expert_inputs import (
    check_kinds,
    check_range,
    check_shapes,
    each_once,
)
from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.compute.cpu.ggml_layer import GgmlLayer
from hybrimoe_plugin.compute.cpu.ggml_union import Unions
from hybrimoe_plugin.compute.cpu.native.kernels import compiled
from hybrimoe_plugin.compute.cpu.requantise import readable_types, supported_weights
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.policy.step import FEW_ROWS
from hybrimoe_plugin.weights.layer_weights import LayerWeights


class GgmlExperts:
    """Routed experts of any GGML type, computed from the mapped bytes.

    Args:
        threads: OpenMP threads that compute; the caller's is one of them unless `beside`.
        beside: compute while the caller goes on, between `submit` and `sync`.
        operations: compute by the compiled operations where there are any, else by ggml's graphs.

    Raises:
        BackendError: kt-kernel's ggml cannot be used.
    """

    def __init__(self, threads: int, beside: bool = False, operations: bool = True) -> None:
        self.name = "operations" if operations and compiled() else "ggml"
        self.threads = threads
        self.workers = threads if beside else 0
        self.repack = not beside
        """Whether layers added from now may be copied into a type with faster kernels.

        That is done where memory is plentiful. Beside an accelerator the file's pages want that
        memory: experts cross the link from there.
        """
        self._ggml = Ggml(operations)
        self._layers: list[GgmlLayer] = []
        self._unions = Unions()
        self._worker = ThreadPoolExecutor(1, "cpu-experts") if beside else None
        self._pending: Callable[[], torch.Tensor] | None = None

    def share(self, ggml: Ggml) -> None:
        """Use the kernels and the thread team of the model's dense part for layers added from now.

        Beside an accelerator the team is the worker thread's, which no dense part uses.
        """
        if self._worker is None:
            self._ggml = ggml

    def add_layer(self, weights: LayerWeights) -> None:
        """Types without a kernel are requantised. Raises: BackendError: values out of range."""
        supported = supported_weights(weights, readable_types())
        layer = GgmlLayer(self._ggml, self.threads, supported, self.repack, self._unions)
        self._layers.append(layer)

    def layer(self, layer: int) -> GgmlLayer:
        """One layer's matrices and graphs."""
        return self._layers[layer]

    def submit(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        mine: Sequence[int],
    ) -> None:
        """The tensors must stay as they are until `sync`. Raises: BackendError: as `compute`."""
        if self._pending is not None:
            self.sync()
        target = self._layers[layer]
        topk_ids, topk_weights = _checked(target.spec, hidden, topk_ids, topk_weights)
        wanted = torch.tensor(mine, dtype=torch.int64, device="cpu")
        kept = torch.isin(topk_ids, wanted)
        call = functools.partial(target.compute_part, hidden, topk_ids, topk_weights, kept)
        if self._worker is not None:
            self._pending = self._worker.submit(call).result
        else:
            output = call()
            self._pending = lambda: output

    def sync(self) -> torch.Tensor:
        assert self._pending is not None, "sync without submit"
        pending, self._pending = self._pending, None
        return pending()

    def abandon(self) -> None:
        if self._worker is not None:
            # An empty task is done only after everything that was submitted before it.
            self._worker.submit(int).result()
        self._pending = None

    def compute(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] of hidden's dtype: every chosen expert of every token, on the caller's thread.

        Args:
            hidden: [T, H] floating point on the CPU.
            topk_ids: [T, K] integers on the CPU.
            topk_weights: [T, K] floating point on the CPU.

        Raises:
            BackendError: a shape or id that the kernel must not see.
        """
        target = self._layers[layer]
        topk_ids, topk_weights = _checked(target.spec, hidden, topk_ids, topk_weights)
        return target.compute(hidden, topk_ids, topk_weights)

    def close(self) -> None:
        self._pending = None
        if self._worker is not None:
            self._worker.shutdown()  # waits for what still runs: it reads from the layers
        self._layers.clear()


def _checked(
    spec: ExpertSpec, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights as kernels take them. Raises: BackendError: what they must not see."""
    check_kinds(hidden, ids, weights)
    check_shapes(spec, hidden, ids, weights)
    if not ids.numel():
        raise BackendError(
            f"a call needs at least one token and one expert, found ids {list(ids.shape)}"
        )
    if len(ids) <= FEW_ROWS:  # plain integers are faster than four operations on small tensors
        rows = ids.tolist()
        low, high = min(map(min, rows)), max(map(max, rows))
        repeated = any(len(set(row)) < len(row) for row in rows)
    else:
        low, high = (int(value) for value in torch.aminmax(ids))
        repeated = ids.shape[1] > 1 and _repeats(ids)
    check_range(spec, low, high)
    if repeated:  # ggml would leave rows unwritten
        return each_once(spec, ids, weights)
    return ids, weights


def _repeats(ids: torch.Tensor) -> bool:
    """Whether a row names an expert twice."""
    steps = ids.sort(dim=1).values.diff(dim=1)
    return bool((steps == 0).any())
