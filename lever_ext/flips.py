"""Flips: tokens that tree verification and plain decoding choose differently in low precision.

In float32 there are none (tests). In 16 bits kernels for many rows round differently from those
for one row, so a token may flip where the target's two best logits are nearly tied. Neither of the
two choices is more right than the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from lever_ext.decoding import LeverDecoding
from lever_ext.speculation.verify import Verifier


@dataclass(frozen=True)
class Flip:
    """A token that plain decoding would not have chosen after the same text."""

    prompt: int
    """Number of the prompt, from 0."""
    position: int
    """Among the generated tokens, from 0."""
    chosen: int
    """The token."""
    plain: int
    """The token that plain decoding chooses."""
    margin: float
    """Plain decoding's logit of its own choice less that of the token that was chosen; at least 0.
    """
    scale: float
    """Largest absolute logit there. Neighbouring bfloat16 values of this size differ by
    `scale` / 256 to `scale` / 128.
    """


@dataclass(frozen=True)
class FlipCount:
    """Of all prompts together."""

    tokens: int
    """Compared."""
    flips: tuple[Flip, ...]

    def first(self) -> list[Flip]:
        """The first flip of each prompt: from there on the texts would differ."""
        found: dict[int, Flip] = {}
        for flip in self.flips:
            found.setdefault(flip.prompt, flip)
        return list(found.values())


def count_flips(
    model: Any, decoder: LeverDecoding, prompts: Sequence[torch.Tensor], new_tokens: int
) -> FlipCount:
    """Decode prompts greedily with trees and compare each token with plain decoding.

    Plain decoding gets the same text token by token, so that a flip is counted once.

    Args:
        model: the target's.
        decoder: by speculation.
        prompts: ids [1, S] each.
        new_tokens: generated for each prompt.

    Raises:
        FlashError: the target's pack cannot be read.
    """
    flips: list[Flip] = []
    tokens = 0
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
    """The tokens of a text that plain decoding, one token a pass, would not have chosen.

    Args:
        model: the target's.
        text: ids [1, S].
        start: position of the first token that is compared.
        prompt: number of the prompt.

    Raises:
        FlashError: the target's pack cannot be read.
    """
    verifier = Verifier(model)
    cache = DynamicCache(config=model.config)
    found: list[Flip] = []
    hidden = verifier.prefill(text[:, :start], cache)
    for place in range(start, text.shape[1]):
        logits = verifier.logits(hidden)[0]
        chosen = int(text[0, place])
        plain = int(logits.argmax())
        if chosen != plain:
            flip = Flip(
                prompt=prompt,
                position=place - start,
                chosen=chosen,
                plain=plain,
                margin=float(logits[plain] - logits[chosen]),
                scale=float(logits.abs().max()),
            )
            found.append(flip)
        if place + 1 < text.shape[1]:
            hidden = verifier.prefill(text[:, place : place + 1], cache)
    return found
