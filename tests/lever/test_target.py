"""A target on flash against the same model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_plugin.errors import BudgetError, FlashError
from lever_ext.target import FlashTarget, load_target
from tests.lever.helpers import (
    least_budget,
    prompt,
)

FAMILY_NAMES = ("llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 24}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_flash_target_equals_the_plain_model(
    family: str, plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    ids = prompt(0, 17)
    with torch.no_grad():
        want = plain_models[family](ids).logits
    whole = None
    for budget in (least_budget(packs[family]), None):
        target = load_target(packs[family], dram_budget=budget)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(target.model(ids).logits, want)
        whole = target.residency.nbytes
        target.close()
    assert whole is not None and least_budget(packs[family]) < whole


def test_foreign_and_missing_rules(packs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="is too small") as refused:
        load_target(packs["llama"], dram_budget="1KiB")
    # The budget that the message asks for is enough.
    load_target(packs["llama"], dram_budget=str(refused.value).split()[-1]).close()
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        '- match: {name: "^model\\\\.layers\\\\.0$"}\n'
        "  replace: {class: lever_ext.operators.decoder.FlashDecoderLayer, kwargs: {}}\n"
    )
    with pytest.raises(FlashError, match="nothing in the pack or the rules"):
        load_target(packs["llama"], rules=rules)


def test_target_survives_a_pass_that_was_cut_off(
    plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    target: FlashTarget = load_target(packs["llama"], dram_budget=least_budget(packs["llama"]))

    class Interrupt(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Interrupt

    layer = target.model.model.layers[2]
    hook = layer.layer.mlp.register_forward_hook(stop)
    with pytest.raises(Interrupt):
        target.model.generate(prompt(0), **GREEDY)
    hook.remove()
    assert torch.equal(
        target.model.generate(prompt(0), **GREEDY),
        plain_models["llama"].generate(prompt(0), **GREEDY),
    )
    target.close()
