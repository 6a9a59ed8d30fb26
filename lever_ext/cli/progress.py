"""Progress bars of commands that run for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def packing_bar(quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for the writer of a pack, as its callback (bytes done, bytes in all).

    Args:
        quiet: show none.
    """
    from tqdm import tqdm

    with tqdm(
        desc="packing", unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=quiet
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
