"""The text of one answer: what `generate` would do with the target's logits."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kept_entries import KeptEntries
from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.errors import SpeculationError
from lever_ext.speculation.stats import SpeculationStats


class Answer:
    """Tokens so far, chosen with `generate`'s own processors and stopping criteria.

    Args:
        model: the target.
        ids: the prompt, [1, S].
        processors: of logits; None for none.
        criteria: for stopping; None for none.
        config: the generation config.
        kwargs: of the model; a KV cache may be among them.
        streamer: gets every token; None for none.
        stats: counts the tokens. Mutates.

    Raises:
        SpeculationError: a KV cache that is no `DynamicCache`.
    """

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        kwargs: dict[str, Any],
        streamer: Any,
        stats: SpeculationStats,
    ) -> None:
        self.ids = ids
        self.config = config
        self.cache = _cache(model, kwargs)
        self.kept = KeptEntries(self.cache)
        self._processors = processors
        self._criteria = criteria
        self._streamer = streamer
        self._stats = stats
        self._scores: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []

    @property
    def last_token(self) -> int:
        return int(self.ids[0, -1])

    @property
    def room(self) -> int:
        """Tokens that may still be drafted: the length limit counts the bonus token too."""
        return int(self.config.max_length) - self.ids.shape[1] - 1

    def append(self, logits: torch.Tensor) -> bool:
        """Choose the next token as `generate` would. Mutates.

        The cache's first entries must be those of all tokens before it: they are kept from here on.

        Args:
            logits: float32 [1, V].

        Returns:
            whether generation has ended.
        """
        scores = self._processed(logits)
        token = self._choose(scores)
        self.ids = torch.cat([self.ids, token], dim=-1)
        self._stats.tokens += 1
        chosen = token[0].cpu()
        put = getattr(self._streamer, "put", None)
        try:
            if put is not None:
                put(chosen)
        finally:
            # Not before: a caller who has not seen the new token goes on from the one before, which
            # then has no entry.
            self.kept.keep(self.ids.shape[1] - 1)
        if self._criteria is None:
            return False
        ended = self._criteria(self.ids, tuple(self._scores) or None)
        return bool(ended.all())

    def end(self) -> None:
        """Tell the streamer that all tokens are there."""
        if self._streamer is not None:
            self._streamer.end()

    def output(self, cache_name: str) -> Any:
        """What `generate` returns.

        Args:
            cache_name: the model's name for its KV cache.
        """
        if not self.config.return_dict_in_generate:
            return self.ids
        from transformers.generation import GenerateDecoderOnlyOutput

        output = GenerateDecoderOnlyOutput(
            sequences=self.ids,
            scores=tuple(self._scores) or None,
            logits=tuple(self._logits) or None,
        )
        output[cache_name] = self.cache
        return output

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        """The scores that the next token is chosen by; what the caller asked for is recorded."""
        scores: torch.Tensor = logits
        if self._processors is not None:
            scores = self._processors(self.ids, logits)
        if self.config.return_dict_in_generate:
            if self.config.output_scores:
                self._scores.append(scores)
            if self.config.output_logits:
                self._logits.append(logits)
        return scores

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The next token [1, 1]: one random number is drawn, as by plain `generate`."""
        if not self.config.do_sample:
            return scores.argmax(dim=-1, keepdim=True)
        shares = torch.softmax(scores, dim=-1)
        return torch.multinomial(shares, num_samples=1)


def _cache(model: Any, kwargs: dict[str, Any]) -> Any:
    """The caller's KV cache, or a new one."""
    from transformers import DynamicCache

    found = cache_in(kwargs)
    if found is None:
        return DynamicCache(config=model.config)
    if not isinstance(found, DynamicCache):
        raise SpeculationError(f"speculation needs a DynamicCache, found {type(found).__name__}")
    return found
