"""Where a pack's weights come from: parameter names to tensors, read one tensor at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.files import open_regular

SAMPLE_BYTES = 4096
"""Of each tensor, from its middle: they tell models of one shape apart."""


class TensorSource(Protocol):
    """Weights under the names that `transformers` gives to a model's parameters."""

    identity: str
    """Differs where the weights differ; an interrupted pack is resumed only from the same source.
    """

    def get(self, name: str) -> torch.Tensor:
        """The parameter. Raises: WeightsError: missing or unreadable."""
        ...

    def expert(self, name: str, expert: int) -> torch.Tensor:
        """One expert's rows of a stacked parameter. Raises: WeightsError: missing or unreadable."""
        ...


class StateDictSource:
    """Weights in memory.

    Args:
        tensors: parameter name -> tensor.
        identity: see `TensorSource`.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], identity: str) -> None:
        self.tensors = tensors
        self.identity = identity

    def get(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise WeightsError(f"{self.identity}: tensor {name!r} is missing")
        return self.tensors[name]

    def expert(self, name: str, expert: int) -> torch.Tensor:
        return self.get(name)[expert]


class Span(NamedTuple):
    """Where a tensor lies in its file."""

    offset: int
    nbytes: int


def file_identity(path: Path, tensors: Sequence[Span]) -> str:
    """What tells a weights file from others: its name, size and time, and a digest of its content.

    Models of one shape have files of one name and size, and copying keeps the time. The digest is
    over all that comes before the tensors and a sample of each: it reads megabytes where the file
    has gigabytes.

    Raises:
        WeightsError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
            header_bytes = min((tensor.offset for tensor in tensors), default=found.st_size)
            digest.update(file.read(header_bytes))
            for offset, nbytes in tensors:
                before = max(0, nbytes - SAMPLE_BYTES) // 2
                file.seek(offset + before)
                digest.update(file.read(min(nbytes, SAMPLE_BYTES)))
    except OSError as error:
        raise WeightsError(f"{path}: cannot read the weights ({error.strerror or error})") from None
    return f"{path.name}:{found.st_size}:{found.st_mtime_ns}:{digest.hexdigest()}"
