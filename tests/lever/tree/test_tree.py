"""Token trees, selection against brute force, calibration, latency."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_ext.tree.calibrate import Calibration, Candidates
from lever_ext.tree.candidate_set import CandidateSet, tree_value
from lever_ext.tree.candidates import CandidateTree
from lever_ext.tree.cost import CycleCost
from lever_ext.tree.expert_union import ExpertUnion
from lever_ext.tree.growth import Growth
from lever_ext.tree.latency import LatencyTable
from lever_ext.tree.policies import POLICIES, make_policy
from lever_ext.tree.prefix import best_prefix
from lever_ext.tree.select import best_subtree
from lever_ext.tree.token_tree import DraftedToken, TokenTree


def random_known(seed: int, size: int) -> CandidateSet:
    rng = random.Random(seed)
    parents, reach, left = [-1], [1.0], [1.0]
    for _ in range(size - 1):
        parent = rng.randrange(len(parents))
        value = left[parent] * rng.uniform(0.05, 0.9)
        left[parent] -= value
        parents.append(parent)
        reach.append(value)
        left.append(value)
    return CandidateSet(parents, reach, [DraftedToken(token) for token in range(size)])


def brute_force(known: CandidateSet, cost: CycleCost, spent: float) -> float:
    best = -1e9
    for size in range(len(known.parents)):
        for rest in itertools.combinations(range(1, len(known.parents)), size):
            rows = {0, *rest}
            if all(known.parents[row] in rows for row in rest):
                best = max(best, tree_value(known, sorted(rows), cost, spent))
    return best


def bucketed(seed: int) -> Callable[[int, int], float]:
    """Costs that rise with rows and leaves, with jumps at bucket edges."""
    rng = random.Random(seed)
    bucket, jump, per_leaf = rng.choice([1, 2, 4]), rng.uniform(0, 60), rng.uniform(0, 12)
    per_row = rng.uniform(0, 5)
    return lambda rows, leaves: (
        100 + per_row * rows + jump * (-(-rows // bucket)) + per_leaf * leaves
    )


def test_tree_shape() -> None:
    tree = TokenTree((5, 6, 7, 8, 9), (-1, 0, 0, 1, 3), (1, 0.5, 0.3, 0.2, 0.1), (0, 1, 2, 3, 4))
    assert tree.path(4) == [0, 1, 3, 4]
    assert tree.depths.tolist() == [0, 1, 1, 2, 3]
    assert [np.flatnonzero(row).tolist() for row in tree.mask] == [
        [0],
        [0, 1],
        [0, 2],
        [0, 1, 3],
        [0, 1, 3, 4],
    ]
    assert tree.leaves == 2 and tree.gain == pytest.approx(2.1)
    kept = tree.subset([0, 1, 3])
    assert kept.parents == (-1, 0, 1) and kept.tokens == (5, 6, 8)
    with pytest.raises(ValueError, match="ancestor"):
        tree.subset([0, 3])


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [((), ()), ((1, 2), (-1, 1)), ((1, 2), (0, 0)), ((1, 2, 2), (-1, 0, 0)), ((1, 2), (-1, -1))],
)
def test_tree_refuses_nonsense(tokens: tuple[int, ...], parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        TokenTree(tokens, parents, (1.0,) * len(tokens), tuple(range(len(tokens))))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(0, 50))
def test_exact_where_cost_depends_on_the_count(seed: int, size: int, spent: float) -> None:
    known = random_known(seed, size)
    rng = random.Random(seed)
    times = [rng.uniform(50, 200) for _ in range(size + 1)]
    cost = CycleCost(lambda rows, leaves: times[rows])
    found = best_subtree(known, cost, spent, max_nodes=size)
    assert found.value == pytest.approx(brute_force(known, cost, spent))
    assert found.value == pytest.approx(tree_value(known, found.nodes, cost, spent))


def test_within_one_percent_of_brute_force() -> None:
    worst = 1.0
    for seed in range(120):
        known, cost = random_known(seed, 3 + seed % 8), CycleCost(bucketed(seed))
        found = best_subtree(known, cost, 10.0, max_nodes=20)
        worst = min(worst, found.value / brute_force(known, cost, 10.0))
    assert worst >= 0.99


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(0.001, 0.1))
def test_exact_against_the_rate_of_all_cycles(seed: int, size: int, rate: float) -> None:
    known = random_known(seed, size)
    rng = random.Random(seed)
    times = [rng.uniform(50, 200) for _ in range(size + 1)]
    cost = CycleCost(lambda rows, leaves: times[rows], rate=rate)
    found = best_subtree(known, cost, 5.0, max_nodes=size)
    gain = 1 + sum(known.reach[row] for row in found.nodes if row)
    assert found.value == pytest.approx(gain - rate * (times[len(found.nodes)] + 5.0))
    assert found.value == pytest.approx(brute_force(known, cost, 5.0))


def test_a_poor_cycle_is_kept_short_for_the_sake_of_all() -> None:
    known = CandidateSet(
        [-1, 0, 0, 0], [1.0, 0.1, 0.1, 0.1], [DraftedToken(token) for token in range(4)]
    )
    cost = CycleCost(lambda rows, leaves: 100.0 + 8.0 * rows)
    assert (
        len(best_subtree(known, cost, 0.0, 4).nodes) == 4
    )  # each adds a tenth of the gain for less of the time
    for _ in range(50):
        cost.observe_cycle(4, 200.0)
    assert cost.rate == pytest.approx(0.02)
    assert len(best_subtree(known, cost, 0.0, 4).nodes) == 1  # elsewhere 8 us make 0.16 tokens


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_never_below_the_best_prefix(seed: int, size: int) -> None:
    known, cost = random_known(seed, size), CycleCost(bucketed(seed))
    assert (
        best_subtree(known, cost, 0, size).value >= best_prefix(known, cost, 0, size).value - 1e-12
    )


def test_calibration_keeps_order_and_learns() -> None:
    candidates = Candidates((4, 2, 9), (0.6, 0.2, 0.05))
    calibration = Calibration(rest=2.0)
    for _ in range(200):
        calibration.observe(candidates, 4)
    values = calibration(candidates)
    assert values == sorted(values, reverse=True) and values[0] > 0.84
    assert 0.95 < sum(values) < 1
    for _ in range(200):
        calibration.observe(candidates, 1)
    assert sum(calibration(candidates)) < 0.05


def test_calibrated_probabilities_fit_an_overconfident_draft() -> None:
    rng = np.random.default_rng(0)
    calibration, candidates = Calibration(), Candidates((0, 1, 2), (0.97, 0.02, 0.01))
    for token in rng.choice(4, size=3000, p=[0.5, 0.25, 0.15, 0.1]):
        calibration.observe(candidates, int(token))
    np.testing.assert_allclose(calibration(candidates), [0.5, 0.25, 0.15], atol=0.12)


def test_latency_is_conservative_between_measurements() -> None:
    table = LatencyTable(step=0.5, penalty=0.1, prior=1e-9)
    assert table(4, 2) == 1.0
    table.warm_start([(1, 1, 100.0), (9, 4, 180.0)])
    assert table(1, 1) == pytest.approx(100.0)
    assert table(5, 2) == pytest.approx(140 * 1.1)
    assert table(19, 8) == pytest.approx((180 + 10 * 10) * 1.1)
    table.observe(1, 1, 200.0)
    assert table(1, 1) == pytest.approx(150.0)


def test_latency_noise_does_not_look_like_the_cost_of_rows() -> None:
    """Flat in truth: one slow pass at a shape must not make it look much dearer than its
    neighbours.
    """
    rng, table = np.random.default_rng(0), LatencyTable()
    for rows in rng.integers(1, 64, size=60):
        table.observe(int(rows), int(rows) // 3 + 1, float(rng.normal(100, 10)))
    table.observe(30, 10, 180.0)
    assert table(30, 10) < 125
    table = LatencyTable()
    for _ in range(30):
        for rows, us in ((8, 100.0), (9, 150.0), (16, 150.0)):
            table.observe(rows, 2, us)
    assert table(9, 2) - table(8, 2) > 40, "a bucket's edge that was measured often is one"


def test_noise_of_small_trees_does_not_keep_larger_ones_away() -> None:
    """Flat in truth, but the disk grew slower while the trees happened to grow."""
    table = LatencyTable()
    for rows in range(1, 17):
        table.observe(rows, 1, 500.0 + 5 * rows)
    assert table(32, 1) < 1.12 * table(16, 1)
    for rows in range(20, 61, 4):
        table.observe(rows, 1, 580.0 + 5 * (rows - 16))
    assert table(120, 1) - table(60, 1) == pytest.approx(5 * 60, rel=0.35), (
        "large trees say what rows cost"
    )


def test_expert_union_grows_less_for_shared_experts() -> None:
    union = ExpertUnion(layers=2, experts=8, top_k=2, read_us=10.0, prior=0.01)
    for token, chosen in ((1, [[0, 1], [2, 3]]), (2, [[0, 1], [2, 3]]), (3, [[6, 7], [4, 5]])):
        union.observe([DraftedToken(token)], np.array(chosen)[:, None], reads=4)
    union.bend = (0.0, 1.0)
    start = union.start()
    first = start.add(DraftedToken(1))
    assert first == pytest.approx(40, rel=0.05)
    assert start.peek(DraftedToken(2)) - first < 1 < 35 < start.peek(DraftedToken(3)) - first
    union.set_resident([(0, 6), (0, 7), (1, 4), (1, 5)])
    assert union.start().peek(DraftedToken(3)) < 1


def growth_of(probabilities: Sequence[float], cost: CycleCost, depth_limit: int = 12) -> Growth:
    tree = CandidateTree(0, Calibration(rest=0.05))
    candidates = Candidates(tuple(range(1, len(probabilities) + 1)), tuple(probabilities))
    clock = iter(range(10**9))
    return Growth(
        tree,
        lambda tree, keys: [candidates] * len(keys),
        cost,
        depth_limit,
        64,
        clock=lambda: next(clock) * 1e-6,
    )


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_builds_a_sound_tree_within_limits(name: str) -> None:
    cost = CycleCost(lambda rows, leaves: 50 + rows, draft_times={1: 1.0})
    growth = growth_of((0.6, 0.2, 0.1), cost, depth_limit=5)
    tree = make_policy(name).build(growth)
    assert len(tree) <= growth.max_nodes and tree.depths.max() <= 5
    assert (len(tree) == 1) == (name == "none")


def test_lever_is_no_worse_than_its_twins_where_its_costs_are_true() -> None:
    def measured(name: str, verify: Callable[[int, int], float]) -> float:
        growth = growth_of((0.65, 0.15, 0.08, 0.04), CycleCost(verify, draft_times={1: 1.0}))
        tree = make_policy(name).build(growth)
        return tree.gain / (growth.spent_us + verify(len(tree), tree.leaves))

    for verify in (
        lambda n, m: 40.0,
        lambda n, m: 40.0 + 2 * n,
        lambda n, m: 40.0 + 30 * (-(-n // 8)),
    ):
        ours = measured("lever", verify)
        assert all(ours >= measured(name, verify) * 0.98 for name in POLICIES)


def test_lever_does_not_stall_at_a_bucket_edge() -> None:
    cost = CycleCost(lambda rows, leaves: 40.0 + 30 * (-(-rows // 8)), draft_times={1: 0.5})
    ours = make_policy("lever").build(growth_of((0.95, 0.01), cost, depth_limit=30))
    paper = make_policy("greedy").build(growth_of((0.95, 0.01), cost, depth_limit=30))
    assert len(paper) == 8 and len(ours) >= 16


def test_advance_keeps_what_was_drafted_after_the_new_root() -> None:
    tree = CandidateTree(0, Calibration())
    tree.add(tree.root, Candidates((1, 2), (0.5, 0.4)))
    first = tree.nodes[tree.root].children[0]
    tree.add(first, Candidates((3,), (0.9,)))
    below = tree.nodes[first].children[0]
    tree.advance([tree.root], 1)
    assert tree.root == first and set(tree.nodes) == {first, below}
    assert tree.nodes[below].depth == 1 and tree.nodes[below].reach == pytest.approx(
        tree.nodes[below].step
    )
    tree.advance([first], 77)
    assert len(tree.nodes) == 1 and tree.nodes[tree.root].token == 77
