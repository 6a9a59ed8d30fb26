"""A model that nobody uses any more is freed, with its engine's threads and memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
from loading import injected

from hybrimoe_plugin.errors import BackendError

WHERE: dict[str, dict[str, Any]] = {
    "graphs on the CPU": {"cpu_backend": "auto"},
    "eager": {"cpu_backend": "torch", "graphs": "off"},
    "emulated accelerator": {"accelerator": "emulated", "cache_ratio": 0.5},
}


@pytest.mark.parametrize("where", sorted(WHERE))
@pytest.mark.parametrize("closes", [True, False])
def test_a_dropped_model_is_freed(where: str, closes: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny.write_quantised(path, "mixtral")
    model = injected(path, **WHERE[where])
    model.generate(tiny.tokens(9), max_new_tokens=3, do_sample=False, pad_token_id=0)
    turns, seen = model.hybrimoe.turns, weakref.ref(model)
    if closes:
        model.hybrimoe.close()
    del model
    gc.collect()
    assert seen() is None
    with pytest.raises(BackendError, match="this model was closed"):
        turns.run(lambda: None)
