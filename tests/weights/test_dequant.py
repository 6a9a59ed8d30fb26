"""Every block type in torch operations against `gguf`'s own conversion, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.weights.dequant import dequantize, supported

KNOWN = [name for name in supported() if name != "F32" and name in GGMLQuantizationType.__members__]
"""An older `gguf` package lacks the newest types."""


@pytest.mark.parametrize("count", [1, 256])
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_bytes_become_what_gguf_makes_of_them(name: str, count: int) -> None:
    kind = GGMLQuantizationType[name]
    values, size = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(7).integers(0, 256, (count, size), dtype=np.uint8)
    expected = quants.dequantize(raw, kind).astype(np.float32)
    found = dequantize(torch.from_numpy(raw).flatten(), name, (count, values)).numpy()
    assert np.array_equal(found, expected.reshape(found.shape), equal_nan=True)


def test_all_types_that_gguf_converts_are_there() -> None:
    assert {kind.name for kind in quants._type_traits} <= set(supported())
