"""Which files of a model directory hold its weights, and whether they are quantised."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.files import read_json

INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_END = ".safetensors"
_SHOWN = 3


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a directory with safetensors files, and without GGUF files."""
    if not os.path.isdir(path):
        return False
    folder = Path(path)
    if any(folder.glob("*.gguf")):
        return False
    return os.path.lexists(folder / INDEX) or any(folder.glob(f"*{_END}"))


def weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files with the model's weights, and tensor name -> file name where an index says so.

    Raises:
        WeightsError: the index cannot be read, a file is missing, or there are several and no
            index.
    """
    if os.path.lexists(folder / INDEX):
        return _indexed(folder)
    if os.path.lexists(folder / _WHOLE):
        return [folder / _WHOLE], {}
    files = sorted(folder.glob(f"*{_END}"))
    if len(files) != 1:
        raise WeightsError(
            f"{folder}: expected {INDEX}, {_WHOLE} or one {_END} file, found {len(files)} "
            "such files without an index"
        )
    return files, {}


def _indexed(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{index}: holds no weight_map")
    for name, file in places.items():
        # A name with a directory could lead anywhere.
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(_END):
            raise WeightsError(f"{index}: {name!r} is in {str(file)[:80]!r}, no file's name")
    files = sorted(set(places.values()))
    missing = [file for file in files if not os.path.exists(folder / file)]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise WeightsError(
            f"{index}: {len(missing)} of {len(files)} files are missing: "
            f"{', '.join(missing[:_SHOWN])}{more}"
        )
    return [folder / file for file in files], places


def quantisation(values: Mapping[str, Any]) -> str | None:
    """How a config.json says that the weights beside it are quantised; None if they are not."""
    for key in ("quantization_config", "compression_config"):
        found = values.get(key)
        if found:
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            return str(method or key)[:40]
    return None
