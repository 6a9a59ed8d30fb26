"""Whatever a file states, its model is described or refused with a typed error."""

from __future__ import annotations

import math
from typing import Any

import pytest
from gguf.constants import MODEL_ARCH_NAMES

from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.description import describe
from hybrimoe_plugin.families.registry import family_of
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf
from hybrimoe_plugin.weights.gguf_store import GGUFStore

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.5] * 8,
    "long_factor": [2.0] * 8,
    "short_mscale": 1.2,
    "long_mscale": 1.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "gemma4_text": {"final_logit_softcapping": 30.0},
    "phimoe": {"rope_parameters": LONG, "attention_bias": True},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "olmoe": {"clip_qkv": 0.5},
}
VALUES: tuple[Any, ...] = (
    *(0, 1, 3, 33, -1, 2**31 - 1, 2**40),
    *(0.0, -1.0, 1e-45, 1e38, math.nan, math.inf),
    *("", "x", True, [], [1, 2], [[1]] * 4, ["a"] * 4, [math.nan] * 4, [2**40] * 4),
)


@pytest.fixture(scope="module", params=MODELS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GGUFStore:
    if family_of(request.param).architectures[0] not in MODEL_ARCH_NAMES.values():
        pytest.skip("this gguf package does not know the architecture")
    path = tmp_path_factory.mktemp(request.param) / "m.gguf"
    export_gguf(shrunk_model(request.param, **MODELS[request.param]), path)
    return GGUFStore.open(path)


def test_any_value_of_any_key(store: GGUFStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = dict(store.metadata)
    described = refused = 0
    for key in sound:
        if key.startswith("general."):
            continue
        for value in (*VALUES, None):
            changed = {**sound, key: value}
            if value is None:
                del changed[key]
            monkeypatch.setattr(store, "metadata", changed)
            try:
                describe(store).config()
                described += 1
            except WeightsError:
                refused += 1
    assert described and refused
