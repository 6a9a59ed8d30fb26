"""The operations of a graph that is being built, and their end as one array."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.compute.cpu.native.kernels import Kernels
from hybrimoe_plugin.compute.cpu.native.structures import (
    GraphOf,
    Operation,
    Pointing,
    Product,
    Products,
)
from hybrimoe_plugin.compute.cpu.native.token_attention import AttendedCache

_CHUNKS_PER_THREAD = 4
_LEAST_CHUNK, _MOST_CHUNK = 64 << 10, 512 << 10
"""Bytes of weights of a chunk."""
_GROUP = 4
"""Rows of weights that products take side by side."""


class Step(NamedTuple):
    """An operation to be."""

    run: int
    chunks: int
    data: ctypes.Structure | ctypes.c_int64


class ProductsStep:
    """Products that are going to be one operation."""

    def __init__(self, run: int) -> None:
        self.run = run
        self.products: list[Product] = []
        self.chunks = 0
        self.written: set[int] = set()
        """Addresses of the storages that they write."""

    def add(self, product: Product, out: torch.Tensor) -> None:
        """A product; its rows of a chunk are 0 where `cut` is to choose them."""
        self.products.append(product)
        self.written.add(storage_of(out))

    def cut(self, threads: int) -> None:
        """Cut the products into chunks.

        Weights are read ahead within a chunk, so large ones are faster. But each thread must get
        its share: 8 chunks of two products for two threads.

            gate   | 0 | 1 | 2 | 3 |
            up     | 4 | 5 | 6 | 7 |
        """
        nbytes = sum(product.count * product.weights_stride for product in self.products)
        wanted = nbytes // (_CHUNKS_PER_THREAD * threads)
        wanted = max(_LEAST_CHUNK, min(wanted, _MOST_CHUNK))
        for product in self.products:
            if not product.chunk_rows:
                pieces = -(-product.count * product.weights_stride // wanted)
                rows = -(-product.count // pieces)
                product.chunk_rows = -(-rows // _GROUP) * _GROUP
            product.first_chunk = self.chunks
            self.chunks += -(-product.count // product.chunk_rows)


class Steps:
    """Operations in the order in which they run.

    Args:
        threads: that work on them, the caller's among them.

    Attributes:
        finished: for `Kernels.run`; None until then.
    """

    def __init__(self, kernels: Kernels, threads: int) -> None:
        self._kernels = kernels
        self._threads = threads
        self._steps: list[Step | ProductsStep] = []
        self._converted: dict[tuple[Any, ...], torch.Tensor] = {}
        """Activations as products take them, by their storage, where they lie in it and how they
        were converted.
        """
        self._referenced: list[Any] = []
        """Memory whose addresses the operations hold."""
        self._pointings: list[tuple[Pointing, ProductsStep, int]] = []
        """What sets the weights of products, and which of a step's they are."""
        self._caches: list[AttendedCache] = []
        self.finished: GraphOf | None = None

    def finish(self, *_outputs: Any) -> None:
        """Close the graph: nothing can be added after."""
        made = (Operation * len(self._steps))()
        for operation, step in zip(made, self._steps, strict=True):
            if isinstance(step, ProductsStep):
                step.cut(self._threads)
                products = (Product * len(step.products))(*step.products)
                data: Any = Products(ctypes.addressof(products), len(products))
                for pointing, its_step, first in self._pointings:
                    if its_step is step:
                        pointing.products = ctypes.addressof(products[first])
                self._referenced.append(products)
            else:
                data = step.data
            self._referenced.append(data)
            operation.run = step.run
            operation.chunks = step.chunks
            operation.data = ctypes.addressof(data)
        for cache in self._caches:
            cache.operation = made[cache.step]
        self._referenced.append(made)
        self.finished = GraphOf(ctypes.addressof(made), len(made))

    def run(self) -> None:
        """Compute every output. Mutates: the tensors' buffers."""
        assert self.finished is not None, "finish() comes first"
        self._kernels.run((self.finished,), self._threads)

    def _before_products(self, step: Step, x: torch.Tensor) -> None:
        """Add a conversion, before the last products if these do not make what it reads."""
        last = self._steps[-1] if self._steps else None
        if isinstance(last, ProductsStep) and storage_of(x) not in last.written:
            self._steps.insert(len(self._steps) - 1, step)
        else:
            self._steps.append(step)

    def _products_step(self, run: int, x: torch.Tensor) -> ProductsStep:
        """The operation that products of x can be part of."""
        last = self._steps[-1] if self._steps else None
        if isinstance(last, ProductsStep) and last.run == run and storage_of(x) not in last.written:
            return last
        step = ProductsStep(run)
        self._steps.append(step)
        return step

    def _add(self, run: int, chunks: int, data: ctypes.Structure, out: torch.Tensor) -> None:
        self._steps.append(Step(run, chunks, data))
        self._wrote(out)

    def _wrote(self, out: torch.Tensor) -> None:
        """Forget conversions of what is written anew."""
        self._referenced.append(out)
        storage = storage_of(out)
        stale = [key for key in self._converted if key[0] == storage]
        for key in stale:
            del self._converted[key]


def storage_of(memory: torch.Tensor) -> int:
    """Address of the memory that views share."""
    return memory.untyped_storage().data_ptr()
