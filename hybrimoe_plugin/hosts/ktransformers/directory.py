"""A model directory whose Python files are not run, though `local_chat` says that they may be."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.hosts.files import read_json
from hybrimoe_plugin.hosts.ktransformers.changes import Changes

_OWN_CONFIGS = (
    ("ktransformers.models.configuration_deepseek", "DeepseekV2Config"),
    ("ktransformers.models.configuration_deepseek_v3", "DeepseekV3Config"),
)
"""kTransformers' copies of what DeepSeek's directories hold as code."""

_KNOWN = ("deepseek_v2", "deepseek_v3", "mixtral", "qwen2_moe", "llama")
"""Model types for which nobody needs the directory's code."""


def refuse_own_code(model_path: str | None) -> None:
    """Look at a directory's configuration.

    Raises:
        ConfigError: its tokenizer, or a model that kTransformers does not have, is code of its own.
        WeightsError: a file cannot be read.
    """
    if model_path is None:
        return
    for name in ("config.json", "tokenizer_config.json"):
        path = Path(model_path) / name
        values = read_json(path) if path.exists() else {}
        if not values.get("auto_map") or (
            name == "config.json" and values.get("model_type") in _KNOWN
        ):
            continue
        raise ConfigError(
            f"{path}: auto_map names Python files of the directory, and code from model "
            "directories is never run: take a directory whose files need none"
        )


def run_no_code(changes: Changes) -> None:
    """Let transformers neither run code from the directory, nor ask for it, nor fetch it."""
    transformers: Any = importlib.import_module("transformers")
    for module, name in _OWN_CONFIGS:
        config = getattr(importlib.import_module(module), name)
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    local = {"trust_remote_code": False, "local_files_only": True}
    changes.set(
        transformers.AutoConfig,
        "from_pretrained",
        _with(transformers.AutoConfig.from_pretrained, local),
    )
    changes.set(
        transformers.AutoTokenizer,
        "from_pretrained",
        _with(transformers.AutoTokenizer.from_pretrained, local),
    )
    causal = transformers.AutoModelForCausalLM
    changes.set(causal, "from_config", _with(causal.from_config, {"trust_remote_code": False}))


def _with(method: Callable[..., Any], options: dict[str, Any]) -> Any:
    """The class method with these options, whatever the caller says."""

    @functools.wraps(method)
    def call(*arguments: Any, **given: Any) -> Any:
        return method(*arguments, **{**given, **options})

    return staticmethod(call)
