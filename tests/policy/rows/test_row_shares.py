"""How much each row of a call of a few counts."""

from __future__ import annotations

import numpy as np
import pytest

from hybrimoe_plugin.policy.cache.row_shares import REJECTED, row_shares
from hybrimoe_plugin.policy.step import Rows


def shares(owners: list[int], sure: list[bool]) -> list[float]:
    return row_shares(Rows(np.array(owners), np.array(sure))).tolist()


def test_conversations_of_one_row_count_alike() -> None:
    assert shares([7, 3, 9, 1], [True] * 4) == [0.25] * 4


def test_a_tree_counts_as_much_as_a_conversation_of_one_row() -> None:
    found = shares([5, *[2] * 15], [True, True, *[False] * 14])
    assert found[0] == pytest.approx(0.5)
    assert sum(found[1:]) == pytest.approx(0.5)


def test_rejected_rows_count_less_than_accepted_ones() -> None:
    accepted, rejected = shares([0, 0, 0], [True, True, False])[1:]
    assert rejected == pytest.approx(REJECTED * accepted)
    assert REJECTED < 1.0


def test_a_tree_without_a_sure_row_has_its_share() -> None:
    assert shares([0, 0, 1], [False, False, True]) == pytest.approx([0.25, 0.25, 0.5])
