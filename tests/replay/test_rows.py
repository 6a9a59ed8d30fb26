"""Calls of a few rows: whose they are, what a verification accepts, and how they are judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from eval.policies import traces
from eval.policies.systems import BASELINES, ORACLE, OURS, System, build, prepare
from hybrimoe_plugin.policy.step import FEW_ROWS, Rows, Scored
from hybrimoe_plugin.replay.oracle import BeladyCache
from hybrimoe_plugin.replay.simulator import Outcome, is_prompt, replay
from hybrimoe_plugin.replay.sources import (
    interleaved,
    lengths,
    stretches,
    synthetic,
    trees,
    with_predictions,
)
from hybrimoe_plugin.replay.trace import Call, Trace

LAYERS, EXPERTS, TOP_K = 3, 16, 2


def text(tokens: int = 40, number: int = 0, layers: int = LAYERS) -> Trace:
    made = synthetic(
        layers,
        EXPERTS,
        TOP_K,
        model="made",
        expert_bytes=1000,
        prompt_tokens=5,
        decode_tokens=tokens,
        drift=0.5,
        text=number,
    )
    return with_predictions(made, 0.79)


def texts(*tokens: int) -> list[Trace]:
    return [text(count, number) for number, count in enumerate(tokens)]


def decoded(trace: Trace, token: int) -> list[Call]:
    """The calls of one token of the answer."""
    return [group for group in trace.passes() if len(group[0].ids) == 1][token]


def owners(trace: Trace) -> list[list[int]]:
    """Of each step."""
    found = []
    for group in trace.passes():
        assert all(call.rows is group[0].rows for call in group), "one pass, the same rows"
        assert group[0].rows is not None
        found.append(group[0].rows.owners.tolist())
    return found


def test_each_row_is_its_conversations() -> None:
    conversations = texts(4, 6, 5, 6)
    read = dict.fromkeys(range(4), 0)
    for group in interleaved(conversations, 2).passes():
        rows = group[0].rows
        assert rows is not None
        for row, owner in enumerate(rows.owners.tolist()):
            own = decoded(conversations[owner], read[owner])
            read[owner] += 1
            for call, one in zip(group, own, strict=True):
                assert call.layer == one.layer
                np.testing.assert_array_equal(call.ids[row], one.ids[0])
                np.testing.assert_array_equal(call.weights[row], one.weights[0])
                assert call.scores is not None
                assert one.scores is not None
                np.testing.assert_array_equal(call.scores[row], one.scores[0])
                assert len(call.predicted) == len(one.predicted)
                for many, single in zip(call.predicted, one.predicted, strict=True):
                    np.testing.assert_array_equal(many[row], single[0])
    assert min(read.values()) > 0


def test_where_a_conversation_ends_the_next_one_begins() -> None:
    trace = interleaved(texts(2, 3, 2, 9), 2)
    assert owners(trace) == [[0, 1], [0, 1], [2, 1], [2, 3]]
    assert all(call.rows is not None and call.rows.sure.all() for call in trace.calls)
    assert owners(interleaved(texts(2, 3, 2, 9), 2, steps=3)) == [[0, 1], [0, 1], [2, 1]]


@pytest.mark.parametrize("rows", [1, 2, 8, FEW_ROWS])
def test_stretches_last_for_all_steps_and_end_one_by_one(rows: int) -> None:
    trace = interleaved(stretches(text(), rows, 30, 8), rows, 30)
    seated = owners(trace)
    assert len(seated) == 30
    assert {len(row) for row in seated} == {rows}
    changes = [np.sum(np.array(a) != b) for a, b in zip(seated, seated[1:], strict=False)]
    assert sum(changes) >= 2 * rows, "each row changes hands"
    assert max(changes) <= max(1, rows // 2), "not all at once"


def test_texts_of_these_lengths_fill_the_steps() -> None:
    counted = lengths(4, 30, 8)
    trace = interleaved([text(count, number) for number, count in enumerate(counted)], 4)
    assert len(owners(trace)) >= 30


@pytest.mark.parametrize(
    "conversations", [texts(3), [text(3), text(3, layers=2)]], ids=["too few", "other model"]
)
def test_what_cannot_be_decoded_together_is_an_error(conversations: Sequence[Trace]) -> None:
    with pytest.raises(ValueError, match=r"rows need|different models"):
        interleaved(conversations, 2)


@pytest.mark.parametrize("rows", [1, 2, 8, FEW_ROWS])
def test_accepted_rows_are_the_text(rows: int) -> None:
    made = text(30)
    length = 0
    for group in trees(made, rows, 12).passes():
        accepted, shared = group[0].accepted, group[0].rows
        assert accepted is not None
        assert shared is not None
        assert accepted[0]
        assert shared.sure.tolist() == [True] + [False] * (rows - 1)
        assert len(set(shared.owners.tolist())) == 1
        for token in range(int(accepted.sum())):
            truth = decoded(made, (length + token) % 30)
            for call, one in zip(group, truth, strict=True):
                assert call.accepted is accepted
                assert call.rows is shared
                assert len(call.ids) == rows
                np.testing.assert_array_equal(call.ids[accepted][token], one.ids[0])
        length += int(accepted.sum())


def test_rejected_rows_are_other_tokens_with_all_their_layers() -> None:
    made = text(40)
    known = {
        tuple(np.concatenate([call.ids[0] for call in decoded(made, token)]).tolist()): token
        for token in range(40)
    }
    for group in trees(made, 8, 10).passes():
        rows = np.concatenate([call.ids for call in group], axis=1).tolist()
        assert len({known[tuple(row)] for row in rows}) == 8


def test_a_tree_accepts_the_stated_share() -> None:
    made = trees(text(400), 16, 120, share=0.5)
    accepted = [call.accepted.sum() for call in made.calls if call.accepted is not None]
    assert np.mean(accepted) == pytest.approx(2.0, abs=0.3)


def test_trees_longer_than_their_text_begin_it_anew() -> None:
    found = owners(trees(text(6), 4, 20))
    assert found[0] == [0] * 4
    assert found[-1][0] > 0


@pytest.mark.parametrize("made", [interleaved(texts(9, 9, 9), 3), trees(text(), 3, 9)])
def test_predictions_of_recall_1_are_the_truth(made: Trace) -> None:
    for group in with_predictions(made, 1.0).passes():
        for call in group:
            assert call.rows is not None
            assert len(call.predicted) == LAYERS - 1 - call.layer
            for later, predicted in zip(group[call.layer + 1 :], call.predicted, strict=True):
                np.testing.assert_array_equal(later.ids, predicted)


def test_steps_are_judged_as_decode_and_prompts_are_not() -> None:
    steps = interleaved(texts(9, 9), 2)
    prompt = [call for call in text().calls if len(call.ids) > 1]
    found = run(OURS, Trace(steps.header, [*prompt, *steps.calls]), "a6000", 0.25, skip=2)
    assert (len(found.prefill_us), len(found.decode_us)) == (1, 7)
    assert found.decode_counters.tokens == 7 * 2 * LAYERS


def test_more_rows_than_a_few_are_a_prompt() -> None:
    few = interleaved(texts(3, 3), 2).calls[0]
    many = FEW_ROWS + 1
    ids = np.zeros((many, TOP_K), dtype=np.int64)
    rows = Rows(np.arange(many), np.ones(many, dtype=np.bool_))
    assert not is_prompt(few)
    assert is_prompt(few._replace(rows=None))
    assert is_prompt(few._replace(ids=ids, rows=rows))


def test_belady_knows_the_next_step_of_all_rows() -> None:
    made = interleaved(texts(6, 6, 6), 3)
    cache = BeladyCache(made)
    steps = [[call.ids for call in made.calls if call.layer == layer] for layer in range(LAYERS)]
    seen = [0] * LAYERS
    for call in made.calls:
        cache.observe(call.layer, Scored(call.ids, call.weights, call.scores))
        seen[call.layer] += 1
        later = steps[call.layer][seen[call.layer] :]
        for expert in range(EXPERTS):
            uses = [distance for distance, ids in enumerate(later, 1) if expert in ids]
            rank = 1 / uses[0] if uses else 0.0
            assert cache.ranks[call.layer, expert] == pytest.approx(rank, rel=0.01)


def test_belady_prefers_what_more_rows_need() -> None:
    made = interleaved(texts(2, 2, 2, 2), 4)
    cache = BeladyCache(made)
    needed = np.bincount(made.calls[0].ids.ravel(), minlength=EXPERTS)
    order = np.argsort(-cache.ranks[0], kind="stable")[: np.count_nonzero(needed)]
    assert needed[order].tolist() == sorted(needed[needed > 0].tolist(), reverse=True)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("kind", ["conversations", "tree"])
def test_no_system_beats_the_oracle(kind: str, rows: int, ratio: float) -> None:
    if kind == "tree":
        made = trees(text(60), rows, 30)
    else:
        made = interleaved(stretches(text(60), rows, 30, 12), rows, 30)
    best = sum(run(ORACLE, made, "a6000", ratio).decode_us)
    for system in (*BASELINES, OURS):
        assert best <= 1.005 * sum(run(system, made, "a6000", ratio).decode_us), system.name


def run(
    system: System,
    made: Trace,
    profile: str,
    ratio: float,
    skip: int = 0,
) -> Outcome:
    costs = traces.costs_for(profile, made, "made")
    controller = build(system, made, costs, ratio, None)
    return replay(prepare(system, made, 0.79), controller, skip)
