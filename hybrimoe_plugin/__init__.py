"""HybriMoE for kTransformers-style injection: MoE models whose experts are scheduled over CPU and
accelerator.

    from hybrimoe_plugin import load_model

    model, tokenizer = load_model("path/to/model", "path/to/gguf", cache_ratio=0.25)

`load_plain_model` loads the same files as transformers' own model, without operators.
`EngineSettings` types the settings that `load_model` takes.

Importing this package imports neither torch nor transformers; these two do on first use.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from hybrimoe_plugin.setting_types import EngineSettings

if TYPE_CHECKING:
    from hybrimoe_plugin.hosts.transformers import load_model, load_plain_model

if "torch" not in sys.modules:
    # How often torch's threads look for work before they sleep: 50 us. By default it is for up to
    # 17 ms, which the threads that compute experts would spend waiting for a core (docs/LOG.md).
    # OpenMP reads it when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.2.0"
__all__ = ["EngineSettings", "__version__", "load_model", "load_plain_model"]


def __getattr__(name: str) -> Any:
    if name in ("load_model", "load_plain_model"):
        from hybrimoe_plugin.hosts import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
