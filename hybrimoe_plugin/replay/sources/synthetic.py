"""Generated routing with stated statistics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.replay.sources.popularity import Popularity
from hybrimoe_plugin.replay.trace import Call, Trace, TraceHeader

Floats = NDArray[np.float64]

TOPIC_MEMORY = 0.98
"""Share of the topic that is kept from token to token: a memory of 50 tokens."""
SMALL = 1e-9
"""Added to popularity before its logarithm is taken."""


def synthetic(
    layers: int,
    experts: int,
    top_k: int,
    *,
    model: str,
    expert_bytes: int,
    prompt_tokens: int = 64,
    decode_tokens: int = 128,
    skew: float = 0.0,
    locality: float = 0.0,
    drift: float = 0.0,
    correlation: float = 0.0,
    popularity: Popularity | None = None,
    seed: int = 0,
    text: int = 0,
) -> Trace:
    """Generate routing with stated statistics; every call carries full scores.

    Args:
        skew: standard deviation of the experts' fixed preference (log scale); 0 is flat.
        locality: share of a token's preference that it has from the token before (AR(1)
            coefficient), 0 to below 1.
        drift: share of the preference that changes slowly, as a text's topic does (memory of 50
            tokens), 0 to 1.
        correlation: share of a layer's preference that it has from the layer before (through a
            fixed permutation).
        popularity: [L, E] shares that replace the random skew.
        seed: fixes the model (skew and permutations).
        text: fixes the text that it reads.
    """
    rng = np.random.default_rng(seed)
    if popularity is None:
        base = rng.standard_normal((layers, experts)) * skew
    else:
        base = np.log(popularity + SMALL)
    shuffles = np.stack([rng.permutation(experts) for _ in range(layers)])
    source = (
        f"synthetic: skew {skew}, locality {locality}, drift {drift}, correlation "
        f"{correlation}, seed {seed}/{text}"
    )
    if popularity is not None:
        source += ", measured popularity"

    preferences = _Preferences(
        base, shuffles, locality, drift, correlation, np.random.default_rng([seed, text])
    )
    sizes = [1] * decode_tokens
    if prompt_tokens > 0:
        sizes = [prompt_tokens, *sizes]
    calls: list[Call] = []
    for tokens in sizes:
        logits = np.stack([preferences.next_token() for _ in range(tokens)])
        for layer in range(layers):
            calls.append(_routed(layer, logits[:, layer], top_k))
    return Trace(TraceHeader(model, layers, experts, top_k, expert_bytes, source), calls)


class _Preferences:
    """The router's preferences, token by token; all arrays are [L, E]."""

    def __init__(
        self,
        base: Floats,
        shuffles: NDArray[np.int64],
        locality: float,
        drift: float,
        correlation: float,
        rng: np.random.Generator,
    ) -> None:
        self._base = base
        self._shuffles = shuffles
        self._locality = locality
        self._drift = drift
        self._correlation = correlation
        self._rng = rng
        start = rng.standard_normal((2, *base.shape))
        self._state, self._topic = start

    def next_token(self) -> Floats:
        """Logits of the next token."""
        noise = self._noise()
        fresh = self._rng.standard_normal(self._base.shape)
        self._state = _mixed(self._locality, self._state, noise)
        self._topic = _mixed(TOPIC_MEMORY, self._topic, fresh)
        rest = (1 - self._drift**2) ** 0.5
        quick = rest * self._state
        slow = self._drift * self._topic
        return self._base + quick + slow

    def _noise(self) -> Floats:
        """Normal noise in which each layer resembles the one before it."""
        noise = self._rng.standard_normal(self._base.shape)
        for layer in range(1, len(noise)):
            before = noise[layer - 1]
            linked = before[self._shuffles[layer]]
            noise[layer] = _mixed(self._correlation, linked, noise[layer])
        return noise


def _mixed(share: float, old: Floats, new: Floats) -> Floats:
    """A share of the old and the rest new, of the same variance."""
    rest = (1 - share**2) ** 0.5
    return share * old + rest * new


def _routed(layer: int, logits: Floats, top_k: int) -> Call:
    """Softmax, top-k, renormalised weights for logits [T, E]."""
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    ids = np.argsort(-scores, axis=1)[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    return Call(layer, ids, weights.astype(np.float32), scores.astype(np.float32), ())
