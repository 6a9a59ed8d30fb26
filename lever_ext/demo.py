"""Demo targets that are too slow to stream without speculation, made from SmolLM2.

Every FFN neuron is copied, the copies' output weights divided by their number (Net2Net), so the
model's answers stay the same: eight times wider, 0.6 billion weights, 1.3 GB in two bytes each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from hybrimoe_plugin.hosts.transformers.complete import check_complete
from hybrimoe_plugin.hosts.transformers.config import model_config
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model, meta_model_of
from hybrimoe_plugin.hosts.transformers.tokenizer import load_tokenizer
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import low_bit_copy
from lever_ext.flash.format import PACK_NAME
from lever_ext.flash.plan import packed_tensors
from lever_ext.flash.source import TensorSource
from lever_ext.flash.writer import Progress, write_pack
from lever_ext.packing import StoredSource, plain_config

DEMO_DRAFTS = {50: 0, 65: 12}
"""Rough agreement with the target's greedy choice in percent -> how many of 30 layers have 4 bits,
the others 3.
"""

_INNER = re.compile(r"\.mlp\.(gate|up)_proj\.weight$")
_OUTER = re.compile(r"\.mlp\.down_proj\.weight$")


class WidenedSource:
    """A dense model's weights with every FFN neuron copied `times` times.

    Args:
        source: the model.
        times: a power of two keeps the weights exact.
    """

    def __init__(self, source: TensorSource, times: int) -> None:
        self.source = source
        self.times = times
        self.identity = f"{source.identity} x{times}"

    def get(self, name: str) -> torch.Tensor:
        value = self.source.get(name)
        if _INNER.search(name):
            return value.repeat(self.times, 1)
        if _OUTER.search(name):
            return value.repeat(1, self.times) / self.times
        return value

    def expert(self, name: str, expert: int) -> torch.Tensor:
        return self.source.expert(name, expert)


def widened_pack(
    gguf: str | Path, directory: str | Path, times: int = 8, progress: Progress | None = None
) -> Path:
    """The widened model's pack, made where it is not there yet.

    Raises:
        WeightsError: the GGUF is missing, damaged or not a dense model.
        FlashError: no space, or the disk failed.
    """
    directory = Path(directory)
    if (directory / PACK_NAME).exists():
        return directory / PACK_NAME
    store = GGUFStore.open(gguf)
    config = model_config(None, store)
    narrow = meta_model(config, torch.float32)
    check_complete(narrow, store, config)
    shapes = {name: tuple(value.shape) for name, value in packed_tensors(narrow).items()}
    source = WidenedSource(StoredSource(store, config, shapes), times)
    wide = plain_config(config)
    wide["intermediate_size"] = config.intermediate_size * times
    model = meta_model_of(wide, torch.float32)
    # The tokenizer first: a pack that is there is not made again, so it must be complete.
    tokenizer = load_tokenizer(None, store)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    return write_pack(source, model, wide, directory, progress=progress)


def demo_draft(
    gguf: str | Path, agreement: int = 65, dtype: torch.dtype = torch.bfloat16
) -> LanguageModelDraft:
    """A draft for the demo targets: SmolLM2, which they were made from, in 3 and 4 bits.

    The head and some layers, spread over the model, have 4 bits.

    Args:
        gguf: SmolLM2's file.
        agreement: one of `DEMO_DRAFTS`.
        dtype: of the draft.

    Raises:
        WeightsError: the GGUF is missing or damaged.
    """
    from hybrimoe_plugin.hosts.transformers import load_plain_model

    model, _ = load_plain_model(None, gguf, dtype=dtype, progress=False)
    layers = len(model.base_model.layers)
    finer = DEMO_DRAFTS[agreement]
    spread = {int((place + 0.5) * layers / finer) for place in range(finer)}

    def bits(layer: int) -> int:
        return 4 if layer in spread else 3

    small: Any = low_bit_copy(model, bits, group=32, head_bits=4)
    return LanguageModelDraft(small, f"low-bit {agreement} %")
