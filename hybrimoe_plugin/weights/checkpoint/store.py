"""An open checkpoint directory: safetensors files, mapped as they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.checkpoint.header import FLOATS, read_header
from hybrimoe_plugin.weights.checkpoint.names import Names
from hybrimoe_plugin.weights.gguf_files import FileIdentity, map_file
from hybrimoe_plugin.weights.gguf_store import GGUFStore

ENDING = ".safetensors"
_CONSOLIDATED = "consolidated"
"""Beginning of the names of files that hold the same weights again, in Mistral's own layout."""


class CheckpointStore(GGUFStore):
    """The weights of a checkpoint directory, under the names that the checkpoint gives them.

    Everything that GGUF and safetensors have in common, bytes that are mapped, checked and shared,
    is the base's.

    Attributes:
        names: which tensors make up which parameter; set by the host, which has the model.
    """

    names: Names

    @classmethod
    def open_directory(cls, directory: Path) -> CheckpointStore:
        """Open every safetensors file of a directory.

        Raises:
            WeightsError: there is none, or one is not sound.
        """
        paths = checkpoint_files(directory)
        if not paths:
            raise WeightsError(f"{directory}: holds no {ENDING} file")
        return cls(paths)

    def _add_file(self, index: int, path: Path) -> None:
        file, data = map_file(path)
        self._files.append(file)
        self._mapped[index] = FileIdentity.of(os.fstat(file.fileno()))
        for info in read_header(data, str(path), index):
            if info.name in self.tensors:
                raise WeightsError(f"{path}: tensor {info.name!r} is in another file too")
            self.tensors[info.name] = info
        self._bytes.append(np.frombuffer(data, dtype=np.uint8))

    @property
    def architecture(self) -> str:
        """Raises: WeightsError: only GGUF files name one."""
        raise WeightsError(f"{self.paths[0]}: a checkpoint names no GGUF architecture")

    def check_floats(self, names: Sequence[str]) -> None:
        """Refuse what is no plain floating point, such as packed integers.

        Raises:
            WeightsError: naming a tensor and its type.
        """
        for name in names:
            info = self.info(name)
            if info.type_name not in FLOATS:
                raise WeightsError(
                    f"{self.paths[info.file]}: tensor {name!r} is {info.type_name}; "
                    f"checkpoints are read in {', '.join(FLOATS)}. Use a GGUF file of this model"
                )


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, sorted by name."""
    found = sorted(directory.glob(f"*{ENDING}"))
    return [path for path in found if not path.name.startswith(_CONSOLIDATED)]
