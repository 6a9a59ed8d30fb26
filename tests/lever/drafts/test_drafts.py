"""Drafts against recomputation and their plain twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import LowBitLinear
from lever_ext.drafts.ngram import NGramDraft
from lever_ext.drafts.runner import DirectRunner, HostRunner
from lever_ext.tree.calibrate import Calibration, Candidates
from lever_ext.tree.candidates import CandidateTree
from tests.lever.helpers import (
    prompt,
)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_lean_runner_equals_the_hosts_forward(family: str, plain_models: dict[str, Any]) -> None:
    model, draws = plain_models[family], []
    for runner in (DirectRunner(model), HostRunner(model)):
        draft = LanguageModelDraft(model, runner=runner)
        draft.start(prompt(1)[0, :-1].tolist())
        tree = CandidateTree(int(prompt(1)[0, -1]), Calibration())
        for _ in range(3):
            keys = tree.unexpanded(9, 5)
            found = draft.expand(tree, keys)
            draws += found
            for key, candidates in zip(keys, found, strict=True):
                tree.add(key, candidates)
        path = [tree.root, tree.nodes[tree.root].children[0]]
        tokens = [tree.nodes[key].token for key in path]
        tree.advance(path, tree.nodes[tree.nodes[path[1]].children[0]].token)
        draft.advance(path, tokens, tree)
        draws += draft.expand(tree, tree.unexpanded(9, 3))
    half = len(draws) // 2
    for ours, theirs in zip(draws[:half], draws[half:], strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.probabilities == pytest.approx(theirs.probabilities, rel=1e-4)


def test_draft_equals_recomputation_after_it_was_advanced(plain_models: dict[str, Any]) -> None:
    model, ids = plain_models["llama"], prompt(2)[0].tolist()
    draft = LanguageModelDraft(model, candidates=3)
    draft.start(ids[:-1])
    tree = CandidateTree(ids[-1], Calibration())

    def expand(keys: Sequence[int]) -> None:
        for key, found in zip(keys, draft.expand(tree, keys), strict=True):
            tree.add(key, found)

    def check(key: int, before: Sequence[int]) -> None:
        text = [*before, *(tree.nodes[above].token for above in tree.path(key))]
        with torch.no_grad():
            shares = torch.softmax(model(torch.tensor([text])).logits[0, -1], dim=-1)
        found = tree.nodes[key].candidates
        assert found is not None
        torch.testing.assert_close(torch.tensor(found.probabilities), shares.topk(3).values)

    expand([tree.root])
    first = list(tree.nodes[tree.root].children)
    expand(first[:2])
    second = tree.nodes[first[1]].children
    expand(second[:1])
    for key in (tree.root, first[0], first[1], second[0]):
        check(key, ids[:-1])
    # The target goes to first[1], whose drafted children survive.
    root = tree.root
    tree.advance([root], tree.nodes[first[1]].token)
    draft.advance([root], [ids[-1]], tree)
    expand(second[1:2])
    check(second[1], ids)
    # And then somewhere that was not drafted.
    path, tokens = (
        [tree.root, second[2]],
        [tree.nodes[tree.root].token, tree.nodes[second[2]].token],
    )
    tree.advance(path, 33)
    draft.advance(path, tokens, tree)
    expand([tree.root])
    check(tree.root, [*ids, *tokens])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_low_bit_kernel_equals_its_plain_twin(bits: int) -> None:
    torch.manual_seed(bits)
    weight, value = torch.randn(48, 64), torch.randn(5, 64)
    twin = LowBitLinear(weight, None, bits, 32, torch.float32)
    kernel = LowBitLinear(weight, None, bits, 32, torch.bfloat16)
    assert kernel.kernel and not twin.kernel
    want, got = twin(value), kernel(value.bfloat16()).float()
    assert (got - want).norm() / want.norm() < 0.01  # bfloat16 inputs, scales and outputs
    steps = (twin.dequantized() - weight).abs().view(48, 2, 32).amax(-1)
    width = (weight.view(48, 2, 32).amax(-1) - weight.view(48, 2, 32).amin(-1)) / (2**bits - 1)
    assert bool((steps <= width / 2 + 1e-5).all())


def test_ngram_proposes_what_followed_before() -> None:
    draft = NGramDraft()
    draft.start([1, 2, 3, 9, 1, 2, 3, 4, 1, 2])
    tree = CandidateTree(3, Calibration())
    (found,) = draft.expand(tree, [tree.root])
    assert set(found.tokens) == {9, 4}
    tree.add(tree.root, Candidates((9,), (1.0,)))
    (after,) = draft.expand(tree, tree.nodes[tree.root].children)
    assert after.tokens[0] == 1
