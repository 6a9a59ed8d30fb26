"""What a stage is told: where it runs, at which size, and where files go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

Row = Mapping[str, Any]
"""One result. `case` names it within its stage; `ok` is there where it is judged; figures' names
end in their unit.
"""

Run = Callable[["Place"], Iterator[Row]]
"""What every stage module has under the name `run`; a row is kept as soon as it is yielded."""


class Place(NamedTuple):
    """Where a stage runs."""

    out: Path
    """Results and logs."""
    scratch: Path
    """Large files, kept from run to run."""
    dry: bool
    """No card: the emulated accelerator and Triton's interpreter, at tiny sizes."""

    @property
    def device(self) -> torch.device:
        """The first GPU, or the CPU in a dry run."""
        return torch.device("cpu" if self.dry else "cuda:0")

    @property
    def accelerator(self) -> str:
        """The name in the engine's settings."""
        return "emulated" if self.dry else "cuda"
