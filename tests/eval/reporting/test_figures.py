"""eval.figures: drawn from CSVs, with the peers that these have."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import figures, throughput
from eval.reporting import report


def test_figures_come_from_csvs_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        throughput._row(name, [throughput.Turn(0.5, [0.02])], prompt=100, bound_ms=10.0)
        for name in ("HybriMoE", "llama.cpp")
    ]
    report.save_csv(tmp_path / "throughput_demo.csv", rows)
    result = figures.main(["--results", str(tmp_path), "--out", str(tmp_path / "figures")])
    assert result == {"figures": ["throughput_demo.png"]}
    assert (tmp_path / "figures" / "throughput_demo.png").stat().st_size > 1000
    read = report.read_csv(tmp_path / "throughput_demo.csv")
    assert read[0]["system"] == "HybriMoE" and read[0]["tbt_ms_p50"] == pytest.approx(20)


@pytest.mark.parametrize(
    ("systems", "named"),
    [
        (("HybriMoE", "llama.cpp"), "0.50x to 0.50x of llama.cpp"),
        (("HybriMoE", "llama.cpp", "ik_llama.cpp"), "0.25x to 0.25x of the fastest peer"),
    ],
)
def test_the_figure_of_decode_names_what_ours_is_compared_with(
    systems: tuple[str, ...], named: str
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    speeds = {"HybriMoE": 10.0, "llama.cpp": 20.0, "ik_llama.cpp": 40.0}
    rows = [
        {
            "source": source,
            "system": system,
            "decode_tok_s": speeds[system],
            "prompt_tokens": 128,
        }
        for source in ("throughput_demo", "throughput_qwen3-30b-a3b")
        for system in systems
    ]
    figure, axes = pyplot.subplots()
    figures.draw_cpu(axes, rows)
    assert named in axes.get_title()
    pyplot.close(figure)
