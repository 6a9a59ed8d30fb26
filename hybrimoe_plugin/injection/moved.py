"""Where classes are now whose paths rules files and code may still name.

Rules name classes by path, and so do programs. A class that moves or gets a better name keeps its
old path here. The table is looked up when somebody names the old path; nothing imports it upward.
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
"""Old dotted path of a class -> its present one."""


def current_path(path: str) -> str:
    """The present path of a class that was public under `path`; any other path as it is."""
    return MOVED.get(path, path)


def old_names(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for a module whose classes have moved or were renamed.

    Args:
        module: dotted name of the module under which the classes were public.
    """

    def find(name: str) -> Any:
        path = MOVED.get(f"{module}.{name}")
        if path is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, current = path.rpartition(".")
        return getattr(importlib.import_module(home), current)

    return find
