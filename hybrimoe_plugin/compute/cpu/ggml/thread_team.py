"""Detect that the threads of a graph disturb each other, and fall back to one."""

from __future__ import annotations


class ThreadTeam:
    """Decides whether graphs use all their threads, or one.

    A team is OpenMP's word for the threads that execute one parallel region. ggml's team meets at
    a barrier after each operation. If another process shares a core, its thread holds up all the
    others for whole time slices: on 2 busy cores a decode step took 55 times its time with two
    threads, and twice its time with one (docs/LOG.md).
    """

    STREAK = 3
    """Number of disturbed runs in a row after which graphs use one thread."""
    PAUSES = (128, 4096)
    """Runs until the team is tried again, at first and at most; each failed try doubles them."""

    def __init__(self) -> None:
        self._disturbed = 0
        self._single_runs_left = 0
        self._pause = self.PAUSES[0]

    @property
    def active(self) -> bool:
        """Whether the next run may use all threads."""
        return self._single_runs_left == 0

    def ran_single(self) -> None:
        """Note a run with one thread."""
        self._single_runs_left = max(0, self._single_runs_left - 1)

    def ran_together(self, took_ns: int, single_ns: int) -> None:
        """Note a run with all threads.

        Args:
            took_ns: its time.
            single_ns: the fastest run of the same graph with one thread.
        """
        if took_ns < 2 * single_ns + 500_000:
            self._disturbed = 0
            self._pause = self.PAUSES[0]
            return
        self._disturbed += 1
        if self._disturbed >= self.STREAK:
            self._disturbed = 0
            self._single_runs_left = self._pause
            self._pause = min(2 * self._pause, self.PAUSES[1])
