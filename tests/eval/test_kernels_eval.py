"""`eval.kernels`: what it counts in code that is written down here, and in compiled kernels."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.kernels.rows import CARDS
from eval.kernels.sass import Listing, counted, listing, loads

ROOT = Path(__file__).resolve().parents[2]

ENDING = ["@!P0 EXIT", "STG.E [R2.64], R4", "EXIT", ".L_x_9:", "BRA `(.L_x_9)", "NOP", "NOP"]
LOADED = "LDG.E.128 R4, desc[UR12][R2.64]"


def sass(*lines: str) -> str:
    """Instructions and labels as `nvdisasm` prints them."""
    shown = ["\t.section\t.text.kernel", "kernel:", ".text.kernel:"]
    at = 0
    for line in lines:
        if line.startswith(".L"):
            shown.append(line)
        else:
            shown.append(f"        /*{at:04x}*/                   {line} ;")
            at += 16
    return "\n".join(shown)


def straight(passes: int) -> Listing:
    """A kernel without a loop: one load before, a load and two instructions a pass."""
    return listing(sass("LDC R1", LOADED, *[LOADED, "FFMA", "FFMA"] * passes, *ENDING))


def looping(turn: int) -> Listing:
    """The same with a loop, with so many passes in each turn of it."""
    body = [LOADED, "FFMA", "FFMA"] * turn
    return listing(sass("LDC R1", LOADED, ".L_x_0:", *body, "ISETP", "@!P3 BRA `(.L_x_0)", *ENDING))


def test_the_end_of_a_kernel_is_its_last_exit() -> None:
    found = straight(1)
    assert found.instructions[-1] == "EXIT"
    assert len(found.instructions) == 2 + 3 + 3
    assert loads(found.instructions) == 2
    assert not found.loops


def test_a_loop_is_a_branch_backwards() -> None:
    found = looping(1)
    (loop,) = found.loops
    assert found.of(loop) == [LOADED, "FFMA", "FFMA", "ISETP", "@!P3 BRA `(.L_x_0)"]


def test_branches_forwards_are_no_loops() -> None:
    found = listing(sass("@P0 BRA `(.L_x_1)", "FFMA", ".L_x_1:", *ENDING))
    assert not found.loops


def test_straight_code_counts_once_from_start_to_end() -> None:
    count = counted(straight(1), straight(1), looping(1), passes=1)
    assert count.loop == 5
    assert count.whole == 8
    assert count.note == ""


def test_passes_written_out_count_each() -> None:
    assert counted(straight(3), straight(1), looping(1), passes=3).whole == 2 + 3 * 3 + 3


def test_a_loop_counts_for_each_of_its_passes() -> None:
    count = counted(looping(1), straight(1), looping(1), passes=4)
    assert count.whole == 2 + 4 * 5 + 3


def test_several_passes_in_a_turn_are_divided() -> None:
    count = counted(looping(2), straight(1), looping(2), passes=8)
    assert count.loop == 4
    assert count.whole == 2 + 4 * 8 + 3
    assert "2 passes" in count.note


def test_code_that_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="no loop"):
        counted(straight(1), straight(1), straight(8), passes=1)
    inner = sass(
        *(LOADED, ".L_x_0:", LOADED, ".L_x_1:", "FFMA", "@P1 BRA `(.L_x_1)"),
        *("@P0 BRA `(.L_x_0)", *ENDING),
    )
    with pytest.raises(ValueError, match="inside another"):
        counted(straight(1), straight(1), listing(inner), passes=1)
    odd = listing(sass(".L_x_0:", LOADED, LOADED, LOADED, "@P0 BRA `(.L_x_0)", *ENDING))
    with pytest.raises(ValueError, match="3 loads, a pass 2"):
        counted(straight(1), straight(1), odd, passes=1)


def test_a_cards_limit_falls_with_instructions() -> None:
    card = CARDS[90]
    assert card.share(1.0, 1.0) == 1.0
    assert card.share(20.0, 0.5) == pytest.approx(card.share(10.0, 0.5) / 2)


@pytest.mark.slow
def test_the_command_counts_compiled_kernels(tmp_path: Path) -> None:
    """Bounds are wide: compilers differ. Twice the instructions would be seen."""
    command = [sys.executable, "-m", "eval.kernels", "--quick", "--out", str(tmp_path)]
    # Set by the other tests; the command has to get rid of it.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["spilled"] == result["not_counted"] == []
    with (tmp_path / "kernels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["kernels"]
    for row in rows:
        whole, loop = float(row["instructions_per_weight"]), float(row["loop_per_weight"])
        assert 0.5 < loop < whole < 16, row
        expected = {"Q4_K": 0.5625, "Q8_0": 1.0625}[row["type"]]
        assert float(row["bytes_per_weight"]) == expected
