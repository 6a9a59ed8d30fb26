"""Whether two models say the same: a prompt, decode steps, and a padded batch."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name


@torch.no_grad()
def check_agreement(model: Any, right: Any, **close: Any) -> None:
    """Compare logits with the defaults of `torch.testing.assert_close`, or with `close`.

    Raises:
        AssertionError: they differ.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(
        3, right.config.get_text_config().vocab_size, (2, 25), generator=generator
    )
    prompt, steps = tokens[:1, :21], tokens[:1, 21:]
    mask = torch.ones(2, 21, dtype=torch.int64)
    mask[1, :6] = 0
    for ours, theirs in zip(
        _answers(model, prompt, steps, mask, tokens[:, :21]),
        _answers(right, prompt, steps, mask, tokens[:, :21]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **close)


def _answers(
    model: Any, prompt: torch.Tensor, steps: torch.Tensor, mask: torch.Tensor, batch: torch.Tensor
) -> list[torch.Tensor]:
    out = model(prompt, use_cache=True)
    logits = [out.logits]
    for token in steps.T:
        out = model(token[:, None], use_cache=True, **{cache_name(model): cache_in(out)})
        logits.append(out.logits)
    padded = model(batch, attention_mask=mask).logits
    logits.append(padded[mask.bool()])
    return logits
