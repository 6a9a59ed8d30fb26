"""Open a checkpoint: its files, checked against its index and its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.files import read_json
from hybrimoe_plugin.hosts.transformers.checkpoint.files import INDEX, quantisation, weight_files
from hybrimoe_plugin.hosts.transformers.directory import config_of
from hybrimoe_plugin.weights.safetensors_store import SafetensorsStore

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def open_checkpoint(directory: str | Path) -> SafetensorsStore:
    """The weights of a model directory, mapped; nothing is read or copied.

    Raises:
        WeightsError: a file is missing or not sound, or the weights are quantised.
        ConfigError: config.json names code or kernels that would have to be run or fetched.
    """
    folder = Path(directory)
    where = str(folder)
    values = read_json(folder / "config.json")
    method = quantisation(values)
    if method is not None:
        raise WeightsError(
            f"{where}: its weights are quantised ({method}), which is not read from safetensors: "
            f"make a GGUF of it once with hybrimoe convert {where}"
        )
    config = config_of(values, str(folder / "config.json"))
    files, places = weight_files(folder)
    store = SafetensorsStore(folder, files)
    _check_places(store, places)
    if getattr(config, "tie_word_embeddings", False):
        _drop_copied_head(store)
    return store


def _check_places(store: SafetensorsStore, places: Mapping[str, str]) -> None:
    """Raise WeightsError where a tensor is not in the file that the index names."""
    for name, file in places.items():
        info = store.tensors.get(name)
        if info is None or store.paths[info.file].name != file:
            raise WeightsError(
                f"{store.directory}: {INDEX} says that tensor {name!r} is in {file}, and it is not"
            )


def _drop_copied_head(store: Any) -> None:
    """Leave out a head that is the embedding again, as the config says it is.

    Another one stays, and the check for tensors without a place refuses it.
    """
    tensors = store.tensors
    if _HEAD not in tensors or _EMBEDDING not in tensors:
        return
    head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
    alike = (head.shape, head.type_name) == (embedding.shape, embedding.type_name)
    if alike and np.array_equal(store.raw(_HEAD), store.raw(_EMBEDDING)):
        del tensors[_HEAD]
