"""Open the safetensors files of a transformers checkpoint: mapped, and read where they lie."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hybrimoe_plugin.weights.gguf_header import TensorInfo
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.safetensors_header import read_safetensors_header


class SafetensorsStore(GGUFStore):
    """Read-only view of a checkpoint with a GGUF store's interface.

    BF16, F16 and F32 are GGML types too, so kernels read the files as they are. `with_names` gives
    the tensors the names that the model's parts ask for.

    Args:
        directory: of the model, with its config.json.
        paths: the files.

    Raises:
        WeightsError: a file is not sound, or two have a tensor of one name.
    """

    def __init__(self, directory: Path, paths: Sequence[Path]) -> None:
        super().__init__(paths)
        self.directory = directory

    def with_names(self, tensors: Iterable[TensorInfo], model_type: str) -> None:
        """Replace the tensors by views of them with the names of the model's parameters.

        The routed experts have a GGUF's names: one tensor for each expert, `blk.0.ffn_up.7.weight`.

        Args:
            model_type: transformers' name of the model's family.

        Mutates: the store.
        """
        self.tensors = {info.name: info for info in tensors}
        self.metadata = {"general.architecture": model_type}

    def _header(
        self, data: mmap.mmap, path: Path, index: int
    ) -> tuple[dict[str, Any], list[TensorInfo]]:
        return {}, read_safetensors_header(data, str(path), index)
