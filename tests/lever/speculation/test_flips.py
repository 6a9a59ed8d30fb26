"""Counting where tree verification and plain decoding part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import low_bit_copy
from lever_ext.flips import FlipCount, count_flips, differences
from lever_ext.target import load_target
from lever_ext.tree.policies import make_policy
from tests.lever.helpers import FAMILIES, prompt

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_in_float32_no_token_flips(
    family: str, plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    assert family in FAMILIES
    target = load_target(packs[family])
    draft = LanguageModelDraft(low_bit_copy(plain_models[family], 3, 32))
    decoder = LeverDecoding(draft, make_policy("fixed", 8), target)
    found = count_flips(target.model, decoder, [prompt(seed) for seed in range(4)], 12)
    assert found == FlipCount(48, ())
    target.close()


def test_a_flipped_token_is_found_with_its_margin_and_does_not_count_those_after_it(
    plain_models: dict[str, Any],
) -> None:
    plain = plain_models["llama"]
    text = plain.generate(prompt(1), **GREEDY)
    assert differences(plain, text, 9) == []
    with torch.no_grad():
        logits = plain(text[:, :13]).logits[0, -1]
    second = int(logits.topk(2).indices[1])
    head = torch.cat([text[:, :13], torch.tensor([[second]])], dim=1)
    flipped = plain.generate(head, **{**GREEDY, "max_new_tokens": 7})
    (flip,) = differences(plain, flipped, 9, prompt=5)
    assert (flip.prompt, flip.position, flip.chosen, flip.plain) == (5, 4, second, int(text[0, 13]))
    assert flip.margin == pytest.approx(float(logits.max() - logits[second]), rel=1e-4)
    assert flip.scale == pytest.approx(float(logits.abs().max()), rel=1e-4)
    assert FlipCount(12, (flip, flip)).first() == [flip]
