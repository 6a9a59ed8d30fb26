"""Where a pack's weights come from: parameter names to tensors, read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.files import open_regular

SAMPLE_BYTES = 4096
"""Of each tensor, from its middle: they tell models of one shape apart."""

_STACKED = re.compile(r"^(?P<mlp>.*\.mlp)\.experts\.(?P<part>gate_up_proj|down_proj)$")
_SINGLE_EXPERTS = (
    (
        "{mlp}.experts.{e}.gate_proj.weight",
        "{mlp}.experts.{e}.up_proj.weight",
        "{mlp}.experts.{e}.down_proj.weight",
    ),
    (
        "{moe}.experts.{e}.w1.weight",
        "{moe}.experts.{e}.w3.weight",
        "{moe}.experts.{e}.w2.weight",
    ),
)
"""Names of gate, up and down projection where files hold experts one by one, newer and older style.
"""


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


class SafetensorsSource:
    """A directory of safetensors files, as the Hugging Face hub stores models.

    Experts may be stacked or lie there one by one.

    Raises:
        WeightsError: no weights there, or a file that is not sound.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.files = self._find()
        """Tensor name -> file name."""
        parts = [self.directory.name]
        for file in sorted(set(self.files.values())):
            path = self.directory / file
            parts.append(file_identity(path, _spans(path)))
        self.identity = ",".join(parts)

    def _find(self) -> dict[str, str]:
        from safetensors import SafetensorError, safe_open

        index = self.directory / "model.safetensors.index.json"
        try:
            if index.exists():
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            else:
                files = sorted(file.name for file in self.directory.glob("*.safetensors"))
            if not files:
                raise WeightsError(f"{self.directory}: no .safetensors file in this directory")
            found = {}
            for file in files:
                with safe_open(self.directory / file, framework="pt") as handle:
                    found.update(dict.fromkeys(handle.keys(), file))
            return found
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise WeightsError(
                f"{self.directory}: cannot read the safetensors files ({error})"
            ) from None

    def check_all_used(self, model: Any) -> None:
        """Compare the files' tensors with the model's parameters, which are all that a pack holds.

        Raises:
            WeightsError: naming tensors that no parameter of the model is made from.
        """
        used: set[str] = set()
        for parameter, value in model.state_dict().items():
            used.update(_names(parameter, len(value)))
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        ignored = [re.compile(pattern) for pattern in patterns]
        layers = model.config.num_hidden_layers

        def is_unused(name: str) -> bool:
            if name in used or _beyond(name, layers):
                return False
            if name.endswith(".rotary_emb.inv_freq"):  # computed from the config
                return False
            return not any(pattern.search(name) for pattern in ignored)

        unused = [name for name in self.files if is_unused(name)]
        if unused:
            raise WeightsError(
                f"{self.directory}: a {model.config.model_type} model has no place for "
                f"{', '.join(map(repr, sorted(unused)[:8]))} ({len(unused)} in all), without "
                f"which its answers would be wrong"
            )

    def _read(self, name: str, expert: int | None = None) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        if name not in self.files:
            raise WeightsError(f"{self.directory}: tensor {name!r} is missing")
        try:
            with safe_open(self.directory / self.files[name], framework="pt") as handle:
                tensor: torch.Tensor = (
                    handle.get_tensor(name) if expert is None else handle.get_slice(name)[expert]
                )
                return tensor
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{self.directory}: cannot read tensor {name!r} ({error})") from None

    def get(self, name: str) -> torch.Tensor:
        older = _older_router(name)
        if name not in self.files and older in self.files:
            return self._read(older)
        return self._read(name)

    def expert(self, name: str, expert: int) -> torch.Tensor:
        match = _STACKED.match(name)
        if name in self.files or match is None:
            return self._read(name, expert)
        for gate, up, down in _single_names(match["mlp"], expert):
            if gate not in self.files:
                continue
            if match["part"] == "down_proj":
                return self._read(down)
            return torch.cat([self._read(gate), self._read(up)])
        raise WeightsError(
            f"{self.directory}: neither {name!r} nor its experts one by one are there"
        )


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


def _spans(path: Path) -> list[Span]:
    """The tensors of a sound safetensors file. Raises: WeightsError: unreadable."""
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot read the weights ({error})") from None
    header.pop("__metadata__", None)
    ranges = (entry["data_offsets"] for entry in header.values())
    return [Span(8 + size + begin, end - begin) for begin, end in ranges]


def _names(parameter: str, count: int) -> list[str]:
    """The names under which files may hold a parameter.

    Args:
        count: rows of the parameter: where it stacks experts, as many experts.
    """
    match = _STACKED.match(parameter)
    if match is None:
        return [parameter, _older_router(parameter)]
    found = [parameter]
    for expert in range(count):
        for names in _single_names(match["mlp"], expert):
            found += names
    return found


def _older_router(name: str) -> str:
    """The older name of a router's tensor; any other name as it is."""
    return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")


def _single_names(mlp: str, expert: int) -> list[list[str]]:
    """Names of one expert's gate, up and down projection, in either style.

    Args:
        mlp: qualified name of the module that holds the experts.
    """
    moe = mlp.removesuffix("mlp") + "block_sparse_moe"
    found = []
    for style in _SINGLE_EXPERTS:
        found.append([part.format(mlp=mlp, moe=moe, e=expert) for part in style])
    return found


def _beyond(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a layer after the last one, which predicts further tokens."""
    match = re.match(r"^model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= layers
