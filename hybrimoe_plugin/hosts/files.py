"""Reading files of a model directory, which may come from anybody: checked first, and bounded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.files import open_regular, read_regular

MAX_JSON_BYTES = 16 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        WeightsError: it is no regular file, cannot be read, is far too large, or is no JSON object.
    """
    try:
        values = json.loads(read_regular(path, MAX_JSON_BYTES))
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: cannot be read as JSON ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def check_file(path: Path, most_bytes: int) -> None:
    """Refuse pipes, devices and oversized files before a library opens them.

    Raises:
        WeightsError: that, or the file cannot be opened.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from error
    if size > most_bytes:
        raise WeightsError(f"{path}: has {size} bytes; more than {most_bytes} is refused")
