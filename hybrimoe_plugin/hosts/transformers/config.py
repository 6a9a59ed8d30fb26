"""The config of the model to load, from a model directory or from GGUF metadata."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.agreement import check_and_follow
from hybrimoe_plugin.families.description import describe
from hybrimoe_plugin.hosts.transformers.directory import directory_config
from hybrimoe_plugin.weights.gguf_store import GGUFStore

log = logging.getLogger(__name__)


def model_config(model_path: str | Path | None, store: GGUFStore | None) -> Any:
    """The model's config from `model_path/config.json`, else from GGUF metadata.

    Raises:
        WeightsError: neither is there, the architecture is unknown, the metadata is out of range or
            asks for what is not supported, or the two do not describe the same model.
        ConfigError: config.json names code or kernels that would have to be run or fetched.
    """
    if model_path is None and store is not None:
        model_path = store.directory
    if model_path is not None and not Path(model_path).exists():
        raise WeightsError(f"{model_path}: no such model directory")
    gguf = store if store is not None and store.directory is None else None
    if has_config(model_path):
        assert model_path is not None
        config = directory_config(model_path)
        if gguf is not None:
            check_and_follow(config, gguf, str(model_path))
        return config
    if gguf is None:
        raise WeightsError(f"{model_path}: no config.json there, and no GGUF file was given")
    described = describe(gguf)
    for notice in described.notices:
        log.warning("%s: %s", described.where, notice)
    return described.config()


def has_config(model_path: str | Path | None) -> bool:
    """Whether a directory is named that holds a config.json."""
    return model_path is not None and (Path(model_path) / "config.json").exists()
