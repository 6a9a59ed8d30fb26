from __future__ import annotations

import pytest

from hybrimoe_plugin.errors import did_you_mean

KNOWN = ("scheduler", "cache_ratio", "flash-pack")


@pytest.mark.parametrize(
    ("found", "meant"),
    [("shceduler", "scheduler"), ("cache-ratio", "cache_ratio"), ("Flash_pakc", "flash-pack")],
)
def test_a_near_miss_is_named(found: str, meant: str) -> None:
    assert did_you_mean(found, KNOWN) == f"; did you mean {meant}?"


def test_nothing_is_suggested_for_another_word() -> None:
    assert did_you_mean("temperature", KNOWN) == ""
