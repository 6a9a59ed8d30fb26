"""The plain model gives each conversation and each path of a tree what it gives it alone.

So masks, positions and cut caches of the scenarios are right, which other tests compare with.
"""

from __future__ import annotations

import few_rows
import pytest
import tiny
import torch
from steps import prefill

FAMILIES = ("mixtral", "deepseek_v2_lite")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_conversation_gets_in_a_batch_what_it_gets_alone(family: str) -> None:
    model = tiny.model(family)
    prompts = [tiny.tokens(length, length)[0] for length in (3, 6, 4)]
    batch = few_rows.Batch(model, prompts)
    steps = tiny.tokens(3, 9, batch=2)
    found = [batch.step(steps[0])]
    batch.keep([0, 2])
    late = tiny.tokens(2, 5)[0]
    batch.join(few_rows.Batch(model, [late]))
    found.append(batch.step(steps[1]))
    for row, ids in enumerate((prompts[0], prompts[2])):
        whole = torch.cat([ids, steps[0, [0, 2][row], None], steps[1, row, None]])
        torch.testing.assert_close(found[1][row], model(whole[None]).logits[0, -1])
    whole = torch.cat([late, steps[1, 2:]])
    torch.testing.assert_close(found[1][2], model(whole[None]).logits[0, -1])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_row_of_a_tree_gets_what_its_path_gets_alone(family: str) -> None:
    model = tiny.model(family)
    prompt = tiny.tokens(4)
    cache = prefill(model, prompt)
    before = prompt
    for seed in range(2):
        tree = few_rows.Tree(12, seed)
        found = tree.call(model, cache)
        for row in range(12):
            ids = torch.cat([before, tree.ids[:, tree.path(row)]], dim=1)
            torch.testing.assert_close(found[row], model(ids).logits[0, -1])
        before = torch.cat([before, tree.ids[:, tree.accepted]], dim=1)
        assert 1 < len(tree.accepted) < 12
        assert cache.get_seq_length() == before.shape[1]
