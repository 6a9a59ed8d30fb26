"""The question about calls of a few rows: its cells, its starts, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import rows
from eval.policies import few_rows, traces
from eval.policies.systems import BASELINES, KTRANSFORMERS, ORACLE, OURS, System
from eval.rows import Cell, Timed
from hybrimoe_plugin.policy.step import FEW_ROWS

CELL = Cell("gptoss", "a6000", 0.25, few_rows.CONVERSATIONS, 2, 4, 3)


def test_every_trace_machine_kind_and_row_count_is_a_cell_once() -> None:
    cells = list(rows.all_cells(quick=False))
    assert len(cells) == len(set(cells))
    assert {cell.trace for cell in cells} == {*traces.FLAT, *traces.REAL, *traces.RECORDED}
    assert {cell.rows for cell in cells} == {1, 2, 4, 8, 16, FEW_ROWS}
    assert {cell.kind for cell in cells} == set(few_rows.KINDS)
    places = {(cell.trace, cell.profile, cell.ratio) for cell in cells}
    assert len(cells) == len(places) * (2 * len(rows.STEPS) - 1), "one row has one kind"


@pytest.mark.parametrize("name", [traces.FLAT[0], traces.REAL[0], traces.RECORDED[0]])
@pytest.mark.parametrize("kind", few_rows.KINDS)
def test_a_cells_routing_has_its_rows_and_steps(name: str, kind: str) -> None:
    made = few_rows.routing(name, kind, 4, 6, 0)
    groups = list(made.passes())
    assert len(groups) == 6
    for group in groups:
        assert {len(call.ids) for call in group} == {4}
        assert all(call.rows is not None for call in group)
    drafted = [group[0].accepted is not None for group in groups]
    assert drafted == [kind == few_rows.TREE] * 6
    assert all(1 <= few_rows.gained(group) <= 4 for group in groups)


def test_starts_are_other_routing_and_the_same_for_all_systems() -> None:
    def chosen(start: int) -> list[int]:
        few_rows.routing.cache_clear()
        made = few_rows.routing("gptoss", few_rows.TREE, 4, 3, start)
        return [expert for call in made.calls for expert in call.ids.ravel().tolist()]

    assert chosen(0) == chosen(0) != chosen(1)


def timed(call_us: float) -> Timed:
    return Timed(call_us, call_us, 2.0, 0.5, 1e6)


def test_near_ties_are_repeated_from_the_same_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def work(cell: Cell, system: System, start: int) -> Timed:
        seen.append((system.name, start))
        if system is OURS:
            return timed(100.0)
        return timed(100.1 + 10.0 * start if system is BASELINES[0] else 200.0)

    monkeypatch.setattr(rows, "timed", work)
    found = {row["system"]: row for row in rows.compared(CELL)}
    assert len(seen) == len(set(seen))
    assert [start for name, start in seen if name == OURS.name] == [0, 1, 2]
    near, far = found[BASELINES[0].name], found[BASELINES[1].name]
    assert near["ours speedup"] == pytest.approx(1.101)
    assert near["starts"] == 3
    assert near["standard error"] == pytest.approx(0.1 / 3**0.5)
    assert (far["ours speedup"], far["starts"], far["standard error"]) == (2.0, 1, 0.0)


def test_a_baseline_that_is_faster_shows() -> None:
    found = [
        rows.row_of(CELL, system, [timed(us)], [timed(100.0)])
        for system, us in (
            (BASELINES[0], 90.0),
            (KTRANSFORMERS, 150.0),
            (OURS, 100.0),
            (ORACLE, 80.0),
        )
    ]
    line = rows.summary_of(found)
    assert (line["over"], line["speedup"]) == (BASELINES[0].name, pytest.approx(0.9))
    assert line["over static"] == pytest.approx(1.5)
    assert line["of oracle"] == pytest.approx(0.8)
    result = rows.summary(found)
    assert result["worst_cell_vs_any_baseline"] == pytest.approx(0.9)
    assert (result["behind"], result["comparisons"]) == (1, 2)


def test_one_row_is_a_plain_step_of_decode() -> None:
    cell = CELL._replace(rows=1)
    made = few_rows.routing(cell.trace, cell.kind, 1, cell.steps, 0)
    assert {len(call.ids) for call in made.calls} == {1}
    assert rows.timed(cell, OURS, 0).tokens == 1.0


def test_a_filtered_run_answers_for_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "mapped", lambda work, jobs, what: [work(job) for job in jobs])
    monkeypatch.setattr(rows, "STEPS", {1: 4, 2: 4, 8: 4})
    monkeypatch.setattr(rows, "STARTS", 2)
    wanted = "--traces mixtral-8x7b --profiles a6000 --ratios 0.5 --rows 1 2 --kinds tree"
    result = rows.main([*wanted.split(), "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["comparisons"] == len(BASELINES)
    assert (tmp_path / "rows.csv").is_file()


def test_filters_that_leave_no_cell_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rows.main(
            ["--traces", "mixtral-8x7b", "--profiles", "a6000", "--kinds", "tree", "--rows", "1"]
        )
    assert "no cell" in capsys.readouterr().err
