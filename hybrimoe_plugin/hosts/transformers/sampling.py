"""Top-k, top-p and min-p by flashinfer where it is installed, else by transformers.

transformers sorts the whole vocabulary for top-p; flashinfer finds the same set of tokens without
sorting. Drawing stays transformers': the filter is a logits processor like those it stands for.
Written against flashinfer 0.7's `sampling`.
"""

from __future__ import annotations

import copy
import importlib
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.compute.attention.flashinfer_pages import installed
from hybrimoe_plugin.errors import BackendError

log = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Probability that may lie elsewhere: rounding may move the token at a border."""
REPEATS = 20

Process = Callable[[Any, torch.Tensor], torch.Tensor]
"""(ids so far, scores [B, V] float32) -> scores, minus infinity where a token is left out."""


class Filters(NamedTuple):
    """The filters of a generation config that come one right after another."""

    temperature: float
    top_k: int
    """0 for none."""
    top_p: float
    """1 for none."""
    min_p: float
    """0 for none."""

    @classmethod
    def of(cls, config: Any, defaults: Any) -> Filters | None:
        """The filters for flashinfer; None where it has nothing to do, or lacks a kernel for one.

        Args:
            defaults: the model's own generation config, which fills what is left open, as in
                `generate`.
        """
        values = []
        for name, otherwise in (
            ("temperature", 1.0),
            ("top_k", 50),
            ("top_p", 1.0),
            ("min_p", 0.0),
        ):
            found = getattr(config, name, None)
            found = getattr(defaults, name, None) if found is None else found
            values.append(otherwise if found is None else found)
        temperature, top_k, top_p, min_p = values
        beams = getattr(config, "num_beams", None) or 1
        if (
            not getattr(config, "do_sample", None)
            or beams > 1
            or getattr(config, "top_h", None) is not None
        ):
            return None
        if (top_k == 0 and top_p == 1.0) or not (
            temperature > 0 and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1
        ):
            return None  # nothing to gain, or an error that transformers explains
        return cls(float(temperature), int(top_k), float(top_p), float(min_p))

    def plain(self) -> Process:
        """transformers' processors, in its order."""
        from transformers.generation import logits_process as processors

        made = processors.LogitsProcessorList()
        if self.temperature != 1.0:
            made.append(processors.TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            made.append(processors.TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            made.append(processors.TopPLogitsWarper(self.top_p))
        if self.min_p:
            made.append(processors.MinPLogitsWarper(self.min_p))
        process: Process = made
        return process

    def taken_from(self, config: Any, defaults: Any) -> Any:
        """The config without these filters.

        They are set to neutral values: what is merely unset would be filled with defaults again.
        """
        rest = copy.deepcopy(config)
        rest.temperature, rest.top_k, rest.top_p = 1.0, 0, 1.0
        rest.min_p = None if getattr(defaults, "min_p", None) is None else 0.0
        return rest


class FlashinferFilter:
    """One processor for all filters; where flashinfer fails, transformers' take over.

    Args:
        library: flashinfer's `sampling` module.
    """

    def __init__(self, library: Any, filters: Filters) -> None:
        self.filters = filters
        self._library: Any = library
        self._plain = filters.plain()

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Filter scores [B, V] float32: the softmax of the result is the filtered distribution."""
        if self._library is None:
            return self._plain(input_ids, scores)
        try:
            return self.filtered(scores)
        except Exception as problem:  # it compiles on first use, and may raise anything
            log.warning(
                "flashinfer no longer filters tokens: %s", " ".join(str(problem).split())[:200]
            )
            self._library = None
            return self._plain(input_ids, scores)

    def filtered(self, scores: torch.Tensor) -> torch.Tensor:
        """As a call. Raises: whatever flashinfer raises."""
        filters = self.filters
        probabilities = torch.softmax(scores / filters.temperature, dim=-1)
        if filters.top_k:
            probabilities = self._library.top_k_renorm_probs(
                probabilities, min(filters.top_k, scores.shape[-1])
            )
        if filters.top_p < 1.0:
            probabilities = self._library.top_p_renorm_probs(probabilities, filters.top_p)
        if filters.min_p:
            least = filters.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        return probabilities.log()


class FlashinferSampling:
    """Chooses a model's filter, once for each kind.

    Args:
        wall_us: times some work that ends on a device.
    """

    def __init__(
        self,
        model: Any,
        wall_us: Callable[[Callable[[], object], torch.device], float] | None = None,
    ) -> None:
        self._model = model
        self._wall_us = wall_us or median_wall_us
        self._known: dict[Filters, FlashinferFilter | None] = {}

    def arguments(self, config: Any) -> dict[str, Any]:
        """`generate`'s arguments for this config: with our processor, or the config alone."""
        device, defaults = getattr(self._model, "device", None), self._model.generation_config
        filters = Filters.of(config, defaults)
        if device is None or filters is None or not usable(device):
            return {"generation_config": config}
        if filters not in self._known:
            vocabulary = int(self._model.config.get_text_config().vocab_size)
            self._known[filters] = choose(filters, vocabulary, device, self._wall_us)
        chosen = self._known[filters]
        if chosen is None:
            return {"generation_config": config}
        from transformers import LogitsProcessorList

        return {
            "generation_config": filters.taken_from(config, defaults),
            "logits_processor": LogitsProcessorList([chosen]),
        }


def choose(
    filters: Filters,
    vocabulary: int,
    device: torch.device,
    wall_us: Callable[[Callable[[], object], torch.device], float],
) -> FlashinferFilter | None:
    """flashinfer's filter, if it gives transformers' distribution in less time; else None."""
    generator = torch.Generator().manual_seed(0)
    # Spread like a model's: some tokens hold most of the probability, the rest is a long tail.
    scores = (4.0 * torch.randn(2, vocabulary, generator=generator)).to(device)
    try:
        found, plain = (
            FlashinferFilter(importlib.import_module("flashinfer").sampling, filters),
            filters.plain(),
        )
        error = distance(found.filtered(scores), plain(None, scores))
        if not error <= TOLERANCE:
            raise BackendError(
                f"it gives {error:.2g} of the probability to other tokens for {filters}"
            )
        ours = wall_us(lambda: plain(None, scores[:1]), device)
        theirs = wall_us(lambda: found.filtered(scores[:1]), device)
    except Exception as problem:  # it compiles on first use, and may raise anything
        log.warning("flashinfer does not filter tokens: %s", " ".join(str(problem).split())[:200])
        return None
    log.info(
        "%s of %d tokens: transformers %.1f us, flashinfer %.1f us",
        filters,
        vocabulary,
        ours,
        theirs,
    )
    return found if theirs < ours else None


def usable(device: torch.device) -> bool:
    return device.type == "cuda" and installed()


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest total variation distance between rows' distributions, given by scores [B, V]."""
    difference = torch.softmax(found.float(), -1) - torch.softmax(right.float(), -1)
    return float(difference.abs().sum(-1).max() / 2)


def median_wall_us(work: Callable[[], object], device: torch.device) -> float:
    """Wall time until the device has finished; after warm-up, the median of some."""
    times = []
    for _ in range(REPEATS + 3):
        torch.cuda.synchronize(device)
        started = time.perf_counter_ns()
        work()
        torch.cuda.synchronize(device)
        times.append((time.perf_counter_ns() - started) / 1e3)
    return sorted(times[3:])[REPEATS // 2]
