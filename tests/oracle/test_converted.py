"""Files from llama.cpp's own converter are the models that they were converted from.

Elsewhere tests write files with our exporter, whose errors would cancel against the reader's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from converted_models import CHANGES
from gguf.constants import MODEL_ARCH_NAMES
from loading import injected, plain

from eval.models.agreement import check_agreement
from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.families.registry import family_of


@pytest.fixture(params=CHANGES)
def made(request: pytest.FixtureRequest, converted: Path) -> Any:
    """(the model, its GGUF file, a directory with config.json alone)."""
    model_type = request.param
    if family_of(model_type).architectures[0] not in MODEL_ARCH_NAMES.values():
        pytest.skip("this gguf package does not know the architecture")
    folder = converted / model_type
    beside = folder / "beside"
    beside.mkdir(exist_ok=True)
    (beside / "config.json").write_bytes((folder / "kept.json").read_bytes())
    return shrunk_model(model_type, **CHANGES[model_type]), folder / "model.gguf", beside


def test_a_converted_file_is_the_model(made: Any) -> None:
    right, path, beside = made
    check_agreement(plain(path), right)
    settings = {"accelerator": "emulated", "cache_ratio": 0.25}
    for directory in (None, beside):
        model = injected(path, directory, **settings)
        check_agreement(model, right)
        model.hybrimoe.close()
