"""Machine profiles and cost curves: exact round trips, typed errors for anything else."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.errors import ProfileError
from hybrimoe_plugin.policy.costs import CostCurve
from hybrimoe_plugin.policy.profile import Link, MachineProfile, Side
from hybrimoe_plugin.replay.profile_files import load_profile

SPEC = ExpertSpec(64, 256, 8, 2, "Q8_0", "Q8_0", "Q8_0", 17408, 17408, 17408)
PROFILE = MachineProfile(
    name="bench",
    label="measured",
    created="2026-11-24",
    spec=SPEC,
    cpu=Side(30.0, (1, 4, 16), (100.0, 150.0, 400.0), 2),
    accelerator=Side(10.0, (1, 64), (20.0, 25.0)),
    link=Link(12.0, 15.0),
    between_layers_us=200.0,
    hardware={"cpu": "x"},
    notes=("none",),
)

FEW_ROWS_TOO = replace(PROFILE, cpu_few_rows=Side(300.0, (1, 2), (80.0, 90.0), 2))


def test_round_trip(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(PROFILE.to_json())
    assert load_profile(tmp_path / "p.json") == PROFILE


def test_costs_of_its_own_shape_are_exact_and_others_scale_with_bytes() -> None:
    costs = PROFILE.costs(SPEC)
    assert [costs.cpu(load) for load in (0, 1, 4, 10, 28)] == [0, 100, 150, 275, 650]
    assert costs.transfer_us == pytest.approx(15 + SPEC.expert_bytes / 12e3)
    double = PROFILE.costs(ExpertSpec(128, 256, 8, 2, "Q8_0", "Q8_0", "Q8_0", 34816, 34816, 34816))
    assert double.cpu(4) == pytest.approx(300)
    assert double.cpu_first_us == costs.cpu_first_us


def test_costs_of_a_few_rows_are_those_of_one_where_they_were_not_measured() -> None:
    old = json.loads(PROFILE.to_json())
    del old["cpu_few_rows"]
    profile = MachineProfile.from_json(json.dumps(old))
    assert profile == PROFILE
    costs = profile.costs(SPEC)
    assert costs.for_rows(few=True) is costs


def test_costs_of_a_few_rows_differ_on_the_cpu_alone(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(FEW_ROWS_TOO.to_json())
    profile = load_profile(tmp_path / "p.json")
    assert profile == FEW_ROWS_TOO
    costs, plain = profile.costs(SPEC), PROFILE.costs(SPEC)
    few = costs.for_rows(few=True)
    assert (few.cpu_first_us, few.cpu(1), few.cpu(2)) == (300.0, 80.0, 90.0)
    for made in (costs.for_rows(few=False), few):
        assert made.accelerator.us == plain.accelerator.us
        assert made.transfer_us == plain.transfer_us
    assert (costs.cpu_first_us, costs.cpu.us) == (plain.cpu_first_us, plain.cpu.us)


def test_noise_cannot_make_more_tokens_cheaper() -> None:
    assert CostCurve((1, 2, 4), (100.0, 90.0, 120.0)).us == (100.0, 100.0, 120.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"),
        ("version", 2),
        ("label", "guessed"),
        ("spec", {"hidden": 1}),
        ("cpu", None),
        ("cpu", {"first_us": -1, "tokens": [1], "us": [1]}),
        ("cpu", {"first_us": 0, "tokens": [2, 1], "us": [1, 2]}),
        ("cpu", {"first_us": 0, "tokens": [1], "us": [1, 2]}),
        ("cpu_few_rows", {"first_us": 0, "tokens": [1], "us": [-1]}),
        ("cpu_few_rows", 5),
        ("link", None),
        ("link", {"gbps": 0, "latency_us": 1}),
        ("between_layers_us", "soon"),
    ],
)
def test_damage_is_named(field: str, value: Any) -> None:
    data = {**json.loads(PROFILE.to_json()), field: value}
    with pytest.raises(ProfileError, match=r"p\.json"):
        MachineProfile.from_json(json.dumps(data), "p.json")


@given(
    st.binary(max_size=200)
    | st.builds(lambda at, by: _mutated(at, by), st.integers(0, 500), st.binary(max_size=4))
)
def test_any_bytes_give_a_profile_or_a_typed_error(raw: bytes) -> None:
    with contextlib.suppress(ProfileError):
        MachineProfile.from_json(raw.decode("utf-8", "replace"))


def _mutated(at: int, by: bytes) -> bytes:
    text = PROFILE.to_json().encode()
    return text[:at] + by + text[at + len(by) :]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot read"):
        load_profile(tmp_path / "none.json")
