"""eval.batches: a table of the right shape, bytes, which counts are slower; nothing is timed."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

import needs
import pytest
import tiny

from eval import batches
from eval.models import files
from eval.peers import roofline
from eval.reporting.rows import column
from hybrimoe_plugin.weights.gguf_store import GGUFStore

needs.kt_kernel()


def test_batches_on_a_tiny_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "read_gbps", lambda threads: 1.0)
    path = tiny.write(tmp_path, "mixtral", types="Q8_0")
    arguments = ["--gguf_path", str(path), "--out", str(tmp_path), "--rows", "1", "3"]
    result = batches.main([*arguments, "--turns", "1", "--context", "4", "--threads", "1"])
    assert set(result["chain_tok_s"]) == {1, 3}
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["slower_with_more_rows"] == result["slower_with_more_rows"]
    assert said["quiet"] is result["quiet"]
    rows = batches.report.read_csv(tmp_path / "batches_model.csv")
    assert column(rows, "kind") == ["conversations", "chain"] * 2
    assert column(rows, "rows") == [1, 1, 3, 3]
    assert rows[0]["experts_a_layer"] == 2 and 2 <= rows[2]["experts_a_layer"] <= 6
    assert (tmp_path / "batches_model.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "slice_"),
    [
        ([], (4, 16)),
        (["--layers", "2"], (2, None)),
        (["--experts", "8"], (4, 8)),
        (["--layers", "2", "--experts", "8"], (2, 8)),
    ],
)
def test_layers_that_were_asked_for_have_all_their_experts(
    flags: list[str], slice_: tuple[int, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(model: str, layers: int, quantisation: str, experts: int | None) -> Path:
        return Path(f"{layers} {experts}")

    monkeypatch.setattr(files.synthetic, "build", build)
    parser = ArgumentParser()
    files.add_options(parser)
    args = parser.parse_args(["--model", "mixtral-8x7b", *flags])
    name, path = files.chosen(args, {"mixtral-8x7b": (4, 16)})
    assert (name, str(path)) == ("mixtral-8x7b", "{} {}".format(*slice_))


def test_a_row_reads_what_a_token_reads(tmp_path: Path) -> None:
    path = tiny.write(tmp_path, "mixtral", types="Q8_0")
    config = tiny.config("mixtral")
    weights = batches.Weights.of(path, config)
    routed = config.num_experts_per_tok * weights.layers * weights.expert_bytes
    assert weights.dense_bytes + routed == pytest.approx(roofline.token_bytes(path, config), abs=1)
    tensors = GGUFStore.open(path).tensors.values()
    assert weights.dense_bytes < sum(info.nbytes for info in tensors)


def with_spread(speeds: dict[int, float], share: float) -> list[dict[str, float]]:
    """Rows with these tokens per second whose outer percentiles lie that share off."""
    return [
        {
            "rows": count,
            "call_ms_p20": 1e3 * count / speed * (1 - share),
            "call_ms_p80": 1e3 * count / speed * (1 + share),
        }
        for count, speed in speeds.items()
    ]


SPEEDS = {1: 30.0, 2: 29.0, 4: 50.0, 8: 70.0, 16: 55.0, 32: 64.0}


def test_slower_ones_are_those_below_the_best_of_fewer_rows() -> None:
    assert batches.slower(with_spread(SPEEDS, 0.0)) == [2, 16, 32]


@pytest.mark.parametrize(("share", "named"), [(0.02, [16, 32]), (0.06, [16]), (0.2, [])])
def test_what_lies_within_the_spread_is_not_called_slower(share: float, named: list[int]) -> None:
    assert batches.slower(with_spread(SPEEDS, share)) == named


@pytest.mark.parametrize("flag", ["--rows", "--context", "--threads", "--turns"])
def test_counts_below_one_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        batches.main([flag, "0"])
    assert "at least 1" in capsys.readouterr().err
