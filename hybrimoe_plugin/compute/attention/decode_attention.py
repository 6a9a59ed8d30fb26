"""Attention of a decode step in CUDA graphs: kernels and shapes; torch's as the plain twin.

A graph reads the whole buffers of a fixed-address cache. Which entries its token sees changes with
every step, so it must lie on the device: `plan` puts it there, once for all layers of a shape.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from hybrimoe_plugin.compute.attention.attend import attend, attend_latents


class Widths(NamedTuple):
    """How the columns of a key are read, and where values lie."""

    main: int
    """Columns that are read in one piece."""
    rest: int
    """Columns behind them: the rotary part of a latent key, else 0."""
    values: int
    """Columns of a value; 0 where the columns `main` of the keys are the values."""

    @property
    def output(self) -> int:
        return self.values or self.main


class AttentionShape(Protocol):
    """One kind of decode attention; hashable."""

    @property
    def heads(self) -> int: ...

    @property
    def groups(self) -> int:
        """Key heads."""
        ...

    @property
    def widths(self) -> Widths: ...

    @property
    def capacity(self) -> int:
        """Tokens that the cache can hold."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def scaling(self) -> float:
        """Factor of the scores."""
        ...

    def example(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Random queries and buffers."""
        ...

    def plain(self, mask: torch.Tensor, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """torch's attention under a mask [B, 1, 1, capacity], bool or added to the scores."""
        ...


class AttentionKernel(Protocol):
    """Attention of one token over a fixed-address cache; `plan` sets what changes by step."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def shape(self) -> AttentionShape: ...

    def plan(self, held: int) -> None:
        """Set the step: its token is number `held` in the cache and attends to all up to itself.

        Not to be called while capturing.
        """
        ...

    def __call__(self, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """[1, heads, 1, width of values] from queries [1, heads, 1, width] and cache buffers."""
        ...


class MaskedAttention:
    """torch's attention over the whole buffers, under a mask that is made once a step.

    The mask is one that is added, in the type of the scores: torch makes such a one of a bool mask,
    in every layer.

    Args:
        batch: sequences that have one token each in a step.
    """

    name = "torch"

    def __init__(self, shape: AttentionShape, device: torch.device, batch: int = 1) -> None:
        self.shape = shape
        with torch.inference_mode(False):
            self._mask = torch.zeros(batch, 1, 1, shape.capacity, dtype=shape.dtype, device=device)

    def plan(self, held: int, given: torch.Tensor | None = None) -> None:
        """As the protocol says. Mutates: the mask that all graphs of this shape read.

        Args:
            given: [B or 1, 1, 1, held + 1] which entries each sequence sees, bool or added to the
                scores; None where each sees all.
        """
        seen = self._mask[..., : held + 1]
        if given is None:
            seen.zero_()
        elif given.dtype == torch.bool:
            seen.zero_().masked_fill_(~given, float("-inf"))
        else:
            seen.copy_(given)
        self._mask[..., held + 1 :].fill_(float("-inf"))

    def __call__(self, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """As the protocol says."""
        return self.shape.plain(self._mask, query, *cache)


class GQAShape(NamedTuple):
    """Queries of several heads over keys and values [1, groups, capacity, width]."""

    heads: int
    groups: int
    """Key heads."""
    width: int
    capacity: int
    dtype: torch.dtype
    scaling: float

    @property
    def widths(self) -> Widths:
        return Widths(main=self.width, rest=0, values=self.width)

    def example(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        query = torch.randn(1, self.heads, 1, self.width, dtype=self.dtype, device=device)
        keys, values = torch.randn(
            2, 1, self.groups, self.capacity, self.width, dtype=self.dtype, device=device
        )
        return query, keys, values

    def plain(self, mask: torch.Tensor, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        keys, values = cache
        return attend(query, keys, values, mask, self.scaling, self.heads != self.groups)


class MLAShape(NamedTuple):
    """Queries of several heads over a cache [1, 1, capacity, latent + rope].

    As a whole it is the keys; its latents are the values.
    """

    heads: int
    latent: int
    rope: int
    capacity: int
    dtype: torch.dtype
    scaling: float

    @property
    def groups(self) -> int:
        return 1

    @property
    def widths(self) -> Widths:
        return Widths(main=self.latent, rest=self.rope, values=0)

    def example(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        width = self.latent + self.rope
        query = torch.randn(1, self.heads, 1, width, dtype=self.dtype, device=device)
        return query, torch.randn(1, 1, self.capacity, width, dtype=self.dtype, device=device)

    def plain(self, mask: torch.Tensor, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        return attend_latents(query, cache[0], mask, self.scaling, self.latent)
