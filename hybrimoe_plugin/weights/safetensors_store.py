"""Open the safetensors files of a transformers checkpoint: mapped, and read where they lie."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.checkpoint.names import Names
from hybrimoe_plugin.weights.gguf_header import TensorInfo
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.safetensors_header import read_safetensors_header

FLOATS = ("BF16", "F16", "F32")
"""Types that are GGML's too, under the same names."""


class SafetensorsStore(GGUFStore):
    """Read-only view of a checkpoint with a GGUF store's interface.

    BF16, F16 and F32 are GGML types too, so kernels read the files as they are.

    Attributes:
        names: which tensors make up which parameter; set by the host, which has the model.

    Args:
        directory: of the model, with its config.json.
        paths: the files.

    Raises:
        WeightsError: a file is not sound, or two have a tensor of one name.
    """

    names: Names

    def __init__(self, directory: Path, paths: Sequence[Path]) -> None:
        super().__init__(paths)
        self.directory = directory

    def check_floats(self, names: Sequence[str]) -> None:
        """Refuse what is no plain floating point, such as packed integers.

        Raises:
            WeightsError: naming a tensor and its type.
        """
        for name in names:
            info = self.info(name)
            if info.type_name not in FLOATS:
                raise WeightsError(
                    f"{self.directory}: tensor {name!r} is stored as {info.type_name}; "
                    f"{', '.join(FLOATS)} are read as they are: make a GGUF of a quantised "
                    f"checkpoint with hybrimoe convert {self.directory}"
                )

    def _header(
        self, data: mmap.mmap, path: Path, index: int
    ) -> tuple[dict[str, Any], list[TensorInfo]]:
        return {}, read_safetensors_header(data, str(path), index)
