"""GGUF metadata, read so that none of it is overlooked: a key that nobody asks for is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.gguf_store import GGUFStore

MOST = (1 << 31) - 1
_CLOSE = 1e-6
"""Relative difference of numbers that are the same, one of them rounded to float32."""
_LONGEST = 60
"""Characters of a value that an error message shows."""

_IGNORED: Mapping[str, str] = {
    "vocab_size": "the rows of token_embd.weight count",
    "pooling_type": "how embeddings are pooled has no part in predicting tokens",
    "attention.layer_norm_epsilon": "of norms that subtract the mean: families with any read it",
    "rope.scaling.finetuned": "tells how the model was trained",
}
"""Keys that have no effect on logits, with the reason."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_feed_forward_length": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (1,),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}
"""Values with which a key changes nothing: 0 is llama.cpp's "not set", and a softmax is gating
function 1.
"""


class Facts:
    """Metadata of one architecture, read with types and ranges checked.

    It remembers which keys were asked for, and `check_all_read` refuses the others.

    Raises:
        WeightsError: the file names no architecture.
    """

    def __init__(self, store: GGUFStore) -> None:
        self.store = store
        self.architecture = store.architecture
        self.where = str(store.paths[0])
        self._asked: set[str] = set()
        self._refused: list[str] = []

    def has(self, key: str) -> bool:
        """Whether the file states `{architecture}.{key}`; this does not count as reading it."""
        return f"{self.architecture}.{key}" in self.store.metadata

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `{architecture}.{key}`."""
        self._asked.add(key)
        return self.store.metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None, *, least: int = 0) -> int:
        """A whole number from `least` to `MOST`, or a list that holds the same one for every layer.

        Raises:
            WeightsError: anything else.
        """
        value = self.get(key, default)
        if isinstance(value, list) and value:
            first = value[0]
            value = first if all(item == first for item in value) else value
        if type(value) is not int or not least <= value <= MOST:
            raise self.wrong(key, f"expected a whole number from {least} to {MOST}", value)
        return value

    def integers(
        self, key: str, count: int, default: int | None = None, *, least: int = 0
    ) -> list[int]:
        """A whole number for each of `count` layers, where the file states one for all or a list.

        Raises:
            WeightsError: anything else.
        """
        value = self.get(key, default)
        found = value if isinstance(value, list) else [value] * count
        good = all(type(item) is int and least <= item <= MOST for item in found)
        if not good or len(found) < count:
            expected = f"expected whole numbers from {least} to {MOST} for {count} layers"
            raise self.wrong(key, expected, value)
        return found[:count]

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number, above 0 where it must be `positive`.

        Raises:
            WeightsError: anything else.
        """
        value = self.get(key, default)
        kind = "number above 0" if positive else "finite number"
        if not _is_number(value) or not math.isfinite(value):
            raise self.wrong(key, f"expected a {kind}", value)
        if positive and value <= 0:
            raise self.wrong(key, f"expected a {kind}", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false, also as 1 or 0. Raises: WeightsError: anything else."""
        value = self.get(key, default)
        if value not in (0, 1):
            raise self.wrong(key, "expected true or false", value)
        return bool(value)

    def only(self, key: str, allowed: Any, why: str, unset: Any = None) -> None:
        """Note a refusal where the file states another value than the one allowed.

        `unset` stands for none, and is accepted too.
        """
        value = self.get(key, allowed)
        if unset is not None and _same(value, unset):
            return
        if not _same(value, allowed):
            self.refuse(f"{self.architecture}.{key} is {_short(value)}, where {why}")

    def refuse(self, what: str) -> None:
        """Note something that would make the answers wrong; `check_all_read` raises it."""
        self._refused.append(what)

    def wrong(self, key: str, what: str, value: Any) -> WeightsError:
        """The error for a value out of range."""
        found = "missing" if value is None else _short(value)
        return WeightsError(f"{self.where}: {self.architecture}.{key} is {found}: {what}")

    def check_all_read(self, neutral: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        """Refuse what was noted, and every key of the architecture that nobody has asked for.

        Args:
            neutral: key -> values that change nothing in this family, beside those of `_NEUTRAL`.

        Raises:
            WeightsError: naming all of them.
        """
        known = {**_NEUTRAL, **(neutral or {})}
        prefix = f"{self.architecture}."
        for full, value in self.store.metadata.items():
            key = full.removeprefix(prefix)
            if not full.startswith(prefix) or key in self._asked or key in _IGNORED:
                continue
            if not any(_same(value, other) for other in known.get(key, ())):
                self.refuse(f"{full} is {_short(value)}")
        if self._refused:
            raise WeightsError(
                f"{self.where}: not supported for architecture {self.architecture!r}, and without "
                f"it the answers would be wrong: {'; '.join(self._refused)}"
            )


def _same(value: Any, other: Any) -> bool:
    """Equal, where floating point numbers were rounded to float32."""
    if _is_number(value) and _is_number(other):
        return math.isclose(value, other, rel_tol=_CLOSE)
    return bool(value == other)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
