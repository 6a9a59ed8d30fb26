"""flashinfer's decode attention inside CUDA graphs, where it is installed, right and faster on this shape.

Written against flashinfer 0.7's Python API (`BatchDecodeWithPagedKVCacheWrapper`). A cache of fixed place is taken as
pages of 16 tokens by its strides; what changes from step to step lies in the wrapper's own device buffers and is set by
`plan`, outside the graphs. Latent attention and sampling stay torch's.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.experts.cuda_graphs import Capture
from hybrimoe_plugin.operators.attention import attend

log = logging.getLogger(__name__)

PAGE = 16
WORKSPACE_BYTES = 128 << 20
"""What flashinfer's documentation asks for."""
TENSOR_CORES_FROM = 4
"""Query heads for each key head from which its tensor-core kernel pays, by its documentation's advice."""
TOLERANCE = 0.02
"""Relative RMS difference from torch's attention in 16-bit types."""


class Shape(NamedTuple):
    """One kind of decode attention."""

    heads: int
    groups: int
    """Key heads."""
    width: int
    room: int
    """Tokens that the cache can hold."""
    dtype: torch.dtype
    scaling: float


class FlashDecode:
    """Attention of one token over keys and values [1, groups, room, width].

    Args:
        library: the flashinfer module.
    """

    def __init__(self, library: Any, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        pages = shape.room // PAGE

        def buffer(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        with torch.inference_mode(False):
            self._wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
                torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=shape.heads >= TENSOR_CORES_FROM * shape.groups,
                paged_kv_indptr_buffer=buffer(2),
                paged_kv_indices_buffer=buffer(pages),
                paged_kv_last_page_len_buffer=buffer(1),
            )

    def plan(self, held: int) -> None:
        """Set the step: this token's row is `held`, and it sees all up to it. Not while capturing."""
        pages = held // PAGE + 1
        self._wrapper.plan(
            torch.tensor([0, pages], dtype=torch.int32),  # on the CPU, where it is read
            torch.arange(pages, dtype=torch.int32),
            torch.tensor([held % PAGE + 1], dtype=torch.int32),
            self.shape.heads,
            self.shape.groups,
            self.shape.width,
            PAGE,
            q_data_type=self.shape.dtype,
            kv_data_type=self.shape.dtype,
            sm_scale=self.shape.scaling,
        )

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[1, heads, 1, width] from queries of that shape."""
        out: torch.Tensor = self._wrapper.run(query[:, :, 0], (self._pages(keys), self._pages(values)))
        return out[:, :, None]

    def _pages(self, cache: torch.Tensor) -> torch.Tensor:
        """[pages, groups, PAGE, width] over the same memory."""
        return cache[0].unflatten(1, (-1, PAGE)).transpose(0, 1)


def choose(shape: Shape, device: torch.device, capture: Capture) -> FlashDecode | None:
    """flashinfer for this shape, if it is installed, gives what torch gives, and replays in less time; else None."""
    if shape.dtype not in (torch.float16, torch.bfloat16) or shape.room % PAGE or not installed():
        return None
    try:
        kernel = FlashDecode(importlib.import_module("flashinfer"), shape, device)
        ours, theirs = compare(kernel, device, capture)
    except Exception as problem:  # it compiles on first use, and may raise anything
        log.warning("flashinfer is not used on %s: %s", device, " ".join(str(problem).split())[:200])
        return None
    log.info("decode attention for %s: torch %.1f us, flashinfer %.1f us", shape, ours, theirs)
    return kernel if theirs < ours else None


def compare(kernel: FlashDecode, device: torch.device, capture: Capture) -> tuple[float, float]:
    """(torch's, flashinfer's) time in us of one call as a graph, with the cache half full.

    Raises:
        BackendError: the two do not give the same.
    """
    shape = kernel.shape
    held = shape.room // 2
    query = torch.randn(1, shape.heads, 1, shape.width, dtype=shape.dtype, device=device)
    keys, values = torch.randn(2, 1, shape.groups, shape.room, shape.width, dtype=shape.dtype, device=device)
    seen = (torch.arange(shape.room, device=device) <= held)[None, None, None]
    kernel.plan(held)
    results, times = [], []
    for work in (
        lambda: attend(query, keys, values, seen, shape.scaling, shape.heads != shape.groups),
        lambda: kernel(query, keys, values),
    ):
        with capture.aside():
            work()
            capture.begin()
            try:
                results.append(work())
                replay = capture.end()
            except BaseException:
                capture.abandon()
                raise
        times.append(capture.time_us(replay))
    right, found = (result.float() for result in results)
    error = float((found - right).norm() / right.norm())
    if not error <= TOLERANCE:
        raise BackendError(f"it differs from torch's attention by {error:.2g} for {shape}")
    return times[0], times[1]


def installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None
