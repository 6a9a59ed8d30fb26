"""How many threads torch computes with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run a sequence of small operations on one thread.

    A team of threads that wait for one another is slower, several times so where other processes
    want the cores: each operation then takes 4 ms, a time slice of the system's (docs/LOG.md).
    Dequantising on one thread takes half as long as `gguf` for Q4_K and Q6_K.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
