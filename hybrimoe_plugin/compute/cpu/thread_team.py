"""Whether the threads of a graph disturb each other."""

from __future__ import annotations


class Team:
    """Whether graphs use all their threads, or one because another process keeps the others off
    their cores.

    ggml's threads meet at a barrier after each operation. A core that is shared holds up every one
    of them for whole time slices: on 2 busy cores a decode step took 55 times its time with two
    threads, with one twice (docs/LOG.md).
    """

    STREAK = 3
    """So many disturbed runs in a row send the team home."""
    PAUSES = (128, 4096)
    """Runs until the next try, at first and at most: each vain try doubles them."""

    def __init__(self) -> None:
        self._disturbed = 0
        self._alone = 0
        self._pause = self.PAUSES[0]

    @property
    def together(self) -> bool:
        return self._alone == 0

    def ran_alone(self) -> None:
        self._alone = max(0, self._alone - 1)

    def ran_together(self, took_ns: int, alone_ns: int) -> None:
        """Compare a run with the fastest that one thread has made of the same graph."""
        if took_ns < 2 * alone_ns + 500_000:
            self._disturbed = 0
            self._pause = self.PAUSES[0]
            return
        self._disturbed += 1
        if self._disturbed >= self.STREAK:
            self._disturbed, self._alone = 0, self._pause
            self._pause = min(2 * self._pause, self.PAUSES[1])
