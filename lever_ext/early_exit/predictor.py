"""The exit predictor: one linear map from a middle layer's hidden state to token scores."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrimoe_plugin.errors import SpeculationError

FORMAT = "lever-exit-1"


@dataclass(frozen=True)
class ExitPredictor:
    """Scores s(u, a) = W[a] . h_u; only the rows of candidate tokens are ever read.

    Args:
        weight: W, [V, H].
        layer: the decoder layer that would compute next.
        loss: on held-out positions at the end of training.
        fingerprint: of the pack that it was trained for.
    """

    weight: torch.Tensor
    layer: int
    loss: float
    fingerprint: str

    def scores(self, hidden: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """Float32 scores [len(tokens)] from one hidden state [H]."""
        rows = self.weight[torch.as_tensor(tokens)]
        return rows.float() @ hidden.float()

    def save(self, path: str | Path) -> None:
        """Write atomically as safetensors.

        Raises:
            SpeculationError: it cannot be written.
        """
        from safetensors.torch import save

        metadata = {
            "format": FORMAT,
            "layer": str(self.layer),
            "loss": repr(self.loss),
            "fingerprint": self.fingerprint,
        }
        write_file(Path(path), save({"weight": self.weight.contiguous()}, metadata))

    @classmethod
    def load(
        cls, path: str | Path, fingerprint: str, shape: tuple[int, int], layers: int
    ) -> ExitPredictor:
        """Read a predictor and check that it belongs to a pack.

        Args:
            fingerprint: the pack's.
            shape: (V, H) of the target.
            layers: of the target.

        Raises:
            SpeculationError: missing, damaged, or trained for another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                weight = file.get_tensor("weight")
            found = cls(
                weight, int(metadata["layer"]), float(metadata["loss"]), metadata["fingerprint"]
            )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise SpeculationError(
                f"{path}: cannot read the early-exit predictor ({error}); train it again"
            ) from None
        if metadata.get("format") != FORMAT or found.fingerprint != fingerprint:
            raise SpeculationError(
                f"{path}: trained for another model or version; train it for this pack"
            )
        if tuple(weight.shape) != shape or not 0 < found.layer < layers:
            raise SpeculationError(
                f"{path}: weight {tuple(weight.shape)} at layer {found.layer} does not fit the "
                f"target"
            )
        return found


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        SpeculationError: it cannot be written.
    """
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            name = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        raise SpeculationError(
            f"{path}: cannot write the early-exit predictor ({error.strerror or error})"
        ) from error
