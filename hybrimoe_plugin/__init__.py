"""HybriMoE for kTransformers-style injection: MoE models whose experts are scheduled over CPU and accelerator.

    from hybrimoe_plugin import load_model

    model, tokenizer = load_model("path/to/model", "path/to/gguf", cache_ratio=0.25)

Importing this package imports neither torch nor transformers; `load_model` does on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe_plugin.hosts.transformers import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from hybrimoe_plugin.hosts.transformers import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "load_model"])
