"""Decodings that take turns."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from eval.lever.turns import Turns


def test_one_thread_runs_all_in_rotation() -> None:
    turns = Turns()
    seen: list[int] = []
    caller = threading.get_ident()

    def turn(mine: int) -> bool:
        assert threading.get_ident() == caller
        seen.append(mine)
        return True

    def run(
        mine: int,
        count: int,
    ) -> None:
        try:
            for _ in range(count):
                assert turns.run(mine, lambda: turn(mine))
        finally:
            turns.leave(mine)

    counts = {0: 3, 1: 1, 2: 2}
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(run, mine, count) for mine, count in counts.items()]
        turns.serve([2, 0, 1])
        for ended in runs:
            ended.result(timeout=20)
    assert seen == [2, 0, 1, 2, 0, 0]


def test_an_error_reaches_its_own_thread_and_stops_nobody_else() -> None:
    turns = Turns()

    def broken() -> bool:
        raise ValueError("broken")

    def sound() -> bool:
        return True

    def run(mine: int) -> bool:
        call = broken if mine == 0 else sound
        try:
            return turns.run(mine, call)
        finally:
            turns.leave(mine)

    with ThreadPoolExecutor(2) as pool:
        failed = pool.submit(run, 0)
        other = pool.submit(run, 1)
        turns.serve([0, 1])
        with pytest.raises(ValueError, match="broken"):
            failed.result(timeout=20)
        assert other.result(timeout=20)
