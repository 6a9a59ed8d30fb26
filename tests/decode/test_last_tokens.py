"""A prompt's last layer: the plain model's logits from a part of its MLP, and when all of it is
computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from steps import step

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.decode.last_tokens import LastTokens
from hybrimoe_plugin.hosts.transformers import load_plain_model

needs.kt_kernel()

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2_lite", "deepseek_v3")
PROMPT = 9


def load(folder: Path, family: str, **settings: Any) -> Any:
    path = tiny.write(folder, family, types=lambda name: "F32")
    return load_model(None, path, progress=False, **{"accelerator": "none", **settings})[0]


@pytest.fixture
def kept_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each served call has kept."""
    kept: list[int] = []
    call = LastTokens.__call__

    def note(self: LastTokens, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output = call(self, hidden, **kwargs)
        kept.append(output.shape[1])
        return output

    monkeypatch.setattr(LastTokens, "__call__", note)
    return kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("keep", "batch"), [(1, 1), (3, 2)])
@torch.no_grad()
def test_logits_are_the_plain_models(
    family: str, keep: int, batch: int, tmp_path: Path, kept_tokens: list[int]
) -> None:
    model = load(tmp_path, family)
    plain = load_plain_model(None, tmp_path / "model.gguf", dtype="float32", progress=False)[0]
    prompt, after = tiny.tokens(PROMPT, batch=batch), tiny.tokens(1, seed=1, batch=batch)
    found = model(prompt, use_cache=True, logits_to_keep=keep)
    wanted = plain(prompt, use_cache=True)
    torch.testing.assert_close(found.logits, wanted.logits[:, -keep:], rtol=1e-4, atol=1e-4)
    assert kept_tokens == [keep]
    assert model.hybrimoe.stats().tokens < PROMPT * batch * len(model.hybrimoe.engines[0].layers)
    # The cache holds the whole prompt, in the last layer too.
    found, wanted = (
        step(one, after, cache_in(out)) for one, out in ((model, found), (plain, wanted))
    )
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    model.hybrimoe.close()


@torch.no_grad()
def test_padding_is_masked_there_too(tmp_path: Path, kept_tokens: list[int]) -> None:
    model = load(tmp_path, "qwen2_moe")
    prompt = tiny.tokens(PROMPT)
    mask = torch.ones(1, PROMPT, dtype=torch.int64)
    mask[:, :4] = 0
    found = model(prompt, attention_mask=mask, logits_to_keep=1).logits
    wanted = model(prompt[:, 4:], logits_to_keep=1).logits
    assert kept_tokens == [1, 1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    model.hybrimoe.close()


@torch.no_grad()
def test_everything_is_computed_for_whoever_looks(tmp_path: Path, kept_tokens: list[int]) -> None:
    model = load(tmp_path, "mixtral")
    prompt = tiny.tokens(PROMPT)
    seen: list[int] = []

    def count(_module: Any, given: Any, _answer: Any) -> None:
        seen.append(given[0].shape[-2])

    last = model.model.layers[-1]
    for module in (last, last.mlp, last.mlp.gate, last.mlp.experts, last.post_attention_layernorm):
        hook = module.register_forward_hook(count)
        model(prompt, logits_to_keep=1)
        hook.remove()
    assert set(seen) == {PROMPT} and len(seen) == 5
    records: list[int] = []
    model.hybrimoe.record(lambda record: records.append(len(record.topk_ids)))
    model(prompt, logits_to_keep=1)
    model.hybrimoe.record(None)
    assert set(records) == {PROMPT}
    with model.hybrimoe.timeline(tmp_path / "timeline.json"):
        model(prompt, logits_to_keep=1)
    for engine in model.hybrimoe.engines:
        engine.timeline = None
    for asked in ({}, {"logits_to_keep": torch.tensor([PROMPT - 1])}, {"logits_to_keep": PROMPT}):
        model(prompt, **asked)
    assert model.model(prompt).last_hidden_state.shape[1] == PROMPT, (
        "not through the language model's head"
    )
    assert not kept_tokens
    model(prompt, logits_to_keep=1)
    assert kept_tokens == [1]
    with pytest.raises(IndexError):  # a failed call leaves nothing behind
        model(torch.tensor([[96, 96]]), logits_to_keep=1)
    assert model.model(prompt).last_hidden_state.shape[1] == PROMPT
    shown = model(prompt, logits_to_keep=1, output_hidden_states=True)
    assert all(states.shape[1] == PROMPT for states in shown.hidden_states)
    assert kept_tokens == [1]
    model.hybrimoe.close()


@torch.no_grad()
def test_router_logits_are_all_there(tmp_path: Path, kept_tokens: list[int]) -> None:
    model = load(tmp_path, "mixtral")
    shown = model(tiny.tokens(PROMPT), logits_to_keep=1, output_router_logits=True)
    assert all(len(logits) == PROMPT for logits in shown.router_logits) and not kept_tokens
    model.hybrimoe.close()


@pytest.mark.parametrize(
    "settings", [{"accelerator": "emulated", "cache_ratio": 0.5}, {"graphs": "off"}]
)
@torch.no_grad()
def test_a_cache_learns_from_the_whole_prompt(
    settings: dict[str, Any], tmp_path: Path, kept_tokens: list[int]
) -> None:
    model = load(tmp_path, "mixtral", **settings)
    model(tiny.tokens(PROMPT), logits_to_keep=1)
    assert not kept_tokens
    assert model.hybrimoe.stats().tokens == PROMPT * len(model.hybrimoe.engines[0].layers)
    model.hybrimoe.close()


@torch.no_grad()
def test_restoring_leaves_nothing_around_the_calls(tmp_path: Path) -> None:
    model = load(tmp_path, "mixtral")
    inside = list(model.model.layers.modules())
    model.hybrimoe.restore()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not [
        module for module in [*inside, *model.model.layers.modules()] if "forward" in vars(module)
    ]
