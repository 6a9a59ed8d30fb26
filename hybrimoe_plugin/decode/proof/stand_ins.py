"""Modules that stand in for a layer's parts, and note how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from hybrimoe_plugin.operators.proof.twin import bare_copy, twin

BATCH, TOKENS = 3, 5
"""Of what layers are run on. No layer takes three sequences for the parts of a pair."""


class Called(NamedTuple):
    """A call of a part."""

    name: str
    given: tuple[Any, ...]
    named: dict[str, Any]
    output: torch.Tensor

    @property
    def hidden(self) -> torch.Tensor:
        """The values that it was given."""
        hidden: torch.Tensor = (*self.given, *self.named.values())[0]
        return hidden

    @property
    def is_of_one(self) -> bool:
        """Whether it was given nothing else."""
        return len(self.given) + len(self.named) == 1


class StandIn(nn.Module):
    """Computes some function, value by value, in place of a part; all else is the part's own.

    Args:
        name: of the part; other names give other functions.
        calls: where it notes its calls.
        pair: whether it gives (values, None), as attention does.
    """

    def __init__(self, name: str, original: Any, calls: list[Called], pair: bool = False) -> None:
        super().__init__()
        self._name = name
        self._original = (original,)  # not a child
        self._calls = calls
        self._pair = pair
        self._shift = 0.1 + (sum(map(ord, name)) % 97) / 50

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = (*args, *kwargs.values())[0]
        y = torch.sin(1.7 * x + self._shift) + 0.3 * x
        self._calls.append(Called(self._name, args, kwargs, y))
        return (y, None) if self._pair else y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)


def copy_with(module: nn.Module, make: Callable[[str, nn.Module], nn.Module]) -> Any:
    """A copy with other children; own parameters are random.

    Raises:
        NoTwinError: own parameters are too large, or nobody knows what is in a buffer.
    """
    made = bare_copy(module)
    made._modules = {}
    made = twin(made, torch.Generator().manual_seed(0))
    children = {
        name: make(name, child) for name, child in module._modules.items() if child is not None
    }
    made._modules = children
    return made


def random_hidden(width: int) -> torch.Tensor:
    """[B, T, H] float32."""
    shape = BATCH, TOKENS, width
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), device="cpu")


def same(found: Any, wanted: Any) -> bool:
    """Whether two tensors are equal but for rounding."""
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
