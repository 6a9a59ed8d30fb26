"""What graphs need of the library that they are built with."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from hybrimoe_plugin.compute.cpu.ggml.binding import GgmlBinding
from hybrimoe_plugin.compute.cpu.ggml.kernel_speed import KernelSpeed
from hybrimoe_plugin.compute.cpu.ggml.thread_team import ThreadTeam


class Forms(NamedTuple):
    """Which of ggml's kernels for a type give the right values on this machine."""

    row: bool
    """`matmul` of one row."""
    rows: bool
    """`matmul` of several rows, which goes through llamafile's tiles where they have the type."""
    indexed: bool
    """`matmul_id`, of any number of rows."""
    lookup: bool
    """`rows`, which dequantises."""

    @property
    def complete(self) -> bool:
        """Whether every product, and every look-up, has a form that is right."""
        return self.lookup and (self.indexed or (self.row and self.rows))


class GraphRuntime(Protocol):
    """What a graph needs of `Ggml`."""

    @property
    def binding(self) -> GgmlBinding: ...

    @property
    def team(self) -> ThreadTeam: ...

    def forms(self, type_name: str) -> Forms: ...

    def kernel_speed(self, type_name: str, threads: int) -> KernelSpeed: ...
