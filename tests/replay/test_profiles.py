"""Shipped machine profiles: readable by name, labelled, with their sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrimoe_plugin.errors import ProfileError
from hybrimoe_plugin.replay.profile_files import load_profile, shipped


def test_the_promised_machines_are_there() -> None:
    names = set(shipped())
    models = ("mixtral-8x7b", "deepseek-v2-lite", "qwen2-57b-a14b")
    assert names >= {f"{kind}-{model}" for kind in ("a6000", "constants") for model in models}
    assert names >= {"rtx4090-desktop", "laptop-8gb"}


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_profile_says_where_its_numbers_come_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.notes
    assert profile.accelerator is not None
    assert profile.link is not None
    costs = profile.costs(profile.spec)
    assert costs.transfer_us > 0
    assert costs.cpu(64) >= costs.cpu(1) > 0


def test_published_constants_are_the_published_ones() -> None:
    costs = load_profile("constants-deepseek-v2-lite").costs(
        load_profile("constants-deepseek-v2-lite").spec
    )
    assert (costs.cpu_first_us, costs.cpu(1), costs.cpu(3), costs.accelerator(9)) == (
        790,
        1000,
        3000,
        500,
    )
    assert costs.transfer_us == pytest.approx(417.9, rel=1e-3)


def test_a_file_goes_before_a_shipped_name_and_unknown_names_list_the_known(tmp_path: Path) -> None:
    path = tmp_path / "laptop-8gb.json"
    path.write_text(load_profile("rtx4090-desktop").to_json())
    assert load_profile(path).name == "rtx4090-desktop"
    with pytest.raises(ProfileError, match="laptop-8gb"):
        load_profile("no-such-machine")
