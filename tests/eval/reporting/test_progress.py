"""The estimate of how long a run will take."""

from __future__ import annotations

import pytest

from eval.reporting.progress import Planned, Progress


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_estimate_comes_first_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    planned = {
        "layers": Planned(3, 10.0),
        "models": Planned(2, 60.0),
    }
    with Progress(planned, 4, clock) as progress:
        out = capsys.readouterr().out
        cells = "5 cells to measure (3 of layers and 2 of models)"
        assert out.startswith(f"{cells}, 4 taken from an earlier run; about 2 min")
        assert progress.left_s() == 150
        clock.now = 20.0
        progress.done("layers")
        # As the measured cell took; the guess for the others.
        assert progress.left_s() == 2 * 20 + 2 * 60
        clock.now = 60.0
        progress.done("layers")
        assert progress.left_s() == 30 + 120
        clock.now = 65.0
        progress.done("models")
        assert progress.left_s() == 30 + 5
    assert "3 of 5 cells, about 35 s left" in capsys.readouterr().err
