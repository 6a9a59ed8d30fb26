"""Where tree verification and plain one-row decoding choose different tokens in low precision.

In float32 they never do (tests). In bfloat16 kernels for many rows round otherwise than those for
one, so a token may flip where the target's two best logits are nearly tied. A flip is either one's
error as much as the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from lever_ext.decoding import LeverDecoding
from lever_ext.verify import Verifier


@dataclass(frozen=True)
class Flip:
    """A token that plain decoding would not have chosen after the same text."""

    prompt: int
    position: int
    """Among the generated tokens, from 0."""
    chosen: int
    plain: int
    margin: float
    """Plain decoding's logit of its own choice less that of the token that was chosen; at least 0.
    """
    scale: float
    """Largest absolute logit there; in bfloat16 logits of this size lie `scale` / 256 to `scale` /
    128 apart.
    """


@dataclass(frozen=True)
class FlipCount:
    """Of all prompts together."""

    tokens: int
    """Compared."""
    flips: tuple[Flip, ...]

    def first(self) -> list[Flip]:
        """The first of each prompt: where the texts would part."""
        found: dict[int, Flip] = {}
        for flip in self.flips:
            found.setdefault(flip.prompt, flip)
        return list(found.values())


def count_flips(
    model: Any, decoder: LeverDecoding, prompts: Sequence[torch.Tensor], new_tokens: int
) -> FlipCount:
    """Decode prompts greedily with trees, then compare each token with plain one-row decoding of
    the same text.

    Args:
        model: the target's.
        prompts: ids [1, S] each.

    Raises:
        FlashError: the target's pack cannot be read.
    """
    flips, tokens = list[Flip](), 0
    for index, ids in enumerate(prompts):
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=decoder,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens += text.shape[1] - ids.shape[1]
        flips += differences(model, text, ids.shape[1], index)
    return FlipCount(tokens, tuple(flips))


@torch.no_grad()
def differences(model: Any, text: torch.Tensor, start: int, prompt: int = 0) -> list[Flip]:
    """The tokens of a text [1, S] from `start` on that plain decoding, one row a pass, would not
    have chosen.

    Raises:
        FlashError: the target's pack cannot be read.
    """
    verifier, cache, found = Verifier(model), DynamicCache(config=model.config), list[Flip]()
    hidden = verifier.prefill(text[:, :start], cache)
    for place in range(start, text.shape[1]):
        logits = verifier.logits(hidden)[0]
        chosen, plain = int(text[0, place]), int(logits.argmax())
        if chosen != plain:
            margin = float(logits[plain] - logits[chosen])
            found.append(
                Flip(prompt, place - start, chosen, plain, margin, float(logits.abs().max()))
            )
        if place + 1 < text.shape[1]:
            hidden = verifier.prefill(text[:, place : place + 1], cache)
    return found
