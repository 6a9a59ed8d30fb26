"""Current paths of classes that moved or were renamed.

Rules files and programs name classes by path, so an old path keeps working. The classes are
imported only when an old path is used: this module imports nothing from the layers above it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

_OPERATORS = "hybrimoe_plugin.operators"

MOVED: Mapping[str, str] = MappingProxyType(
    {
        f"{_OPERATORS}.graphs.GraphedLayer": "hybrimoe_plugin.decode.graphed_layer.GraphedLayer",
        f"{_OPERATORS}.attention.LeanAttention": f"{_OPERATORS}.attention.FusedAttention",
        f"{_OPERATORS}.embedding.LeanEmbedding": f"{_OPERATORS}.embedding.QuantizedEmbedding",
        f"{_OPERATORS}.linear.LeanLinear": f"{_OPERATORS}.linear.QuantizedLinear",
        f"{_OPERATORS}.linear.StoredLinear": f"{_OPERATORS}.linear.GgmlLinear",
        f"{_OPERATORS}.mla.LeanMLA": f"{_OPERATORS}.mla.FusedMLA",
        f"{_OPERATORS}.mlp.LeanMLP": f"{_OPERATORS}.mlp.FusedMLP",
        f"{_OPERATORS}.norm.LeanRMSNorm": f"{_OPERATORS}.norm.FusedRMSNorm",
    }
)
"""Old dotted path of a class -> its current path."""


def current_path(path: str) -> str:
    """The current path of a class once public as `path`; any other path is returned as is."""
    return MOVED.get(path, path)


def old_names(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for a module whose classes moved or were renamed.

    Args:
        module: dotted name of the module in which the classes were public.
    """

    def find(name: str) -> Any:
        path = MOVED.get(f"{module}.{name}")
        if path is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, current = path.rpartition(".")
        return getattr(importlib.import_module(home), current)

    return find
