"""Families beyond the first ones, from GGUF alone and with a config.json, under every policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf.constants import MODEL_ARCH_NAMES
from loading import injected, plain
from more_families import CHANGES

from eval.models.agreement import check_agreement
from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.registry import family_of
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf

POLICIES = (
    ("hybrimoe", "adaptive", "expected"),
    ("greedy", "lru", "score"),
    ("static", "static", "off"),
    ("accelerator_only", "mrs", "impact"),
    ("cpu_only", "lfu", "off"),
)


@pytest.fixture(scope="module", params=CHANGES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the model, its GGUF file, the directory with its config.json)."""
    folder = tmp_path_factory.mktemp(request.param)
    if family_of(request.param).architectures[0] not in MODEL_ARCH_NAMES.values():
        pytest.skip("this gguf package does not know the architecture")
    model = shrunk_model(request.param, **CHANGES[request.param])
    export_gguf(model, folder / "model.gguf")
    model.config.save_pretrained(folder)
    return model, folder / "model.gguf", folder


def test_a_file_alone_is_the_model(made: Any) -> None:
    right, path, _ = made
    check_agreement(plain(path), right)


@pytest.mark.parametrize("number", range(len(POLICIES)))
def test_every_policy_gives_the_plain_logits(made: Any, number: int) -> None:
    right, path, folder = made
    scheduler, cache, prefetch = POLICIES[number]
    model = injected(
        path,
        folder if number % 2 else None,
        accelerator="emulated",
        cache_ratio=0.25,
        scheduler=scheduler,
        cache=cache,
        prefetch=prefetch,
    )
    check_agreement(model, right)
    model.hybrimoe.close()


def test_kernels_that_keep_matrices_as_stored_give_them_too(made: Any) -> None:
    right, path, _ = made
    model = injected(path, cpu_backend="auto")
    check_agreement(model, right, rtol=1e-3, atol=1e-4)  # kernels sum in another order
    model.hybrimoe.close()


def test_a_file_with_kv_b_in_parts_on_kernels(tmp_path: Path) -> None:
    """As current converters write it; only where attention is a fused operator are parts taken."""
    right = shrunk_model("glm4_moe_lite", **CHANGES["glm4_moe_lite"])
    export_gguf(right, tmp_path / "model.gguf", split_kv_b=True)
    model = injected(tmp_path / "model.gguf", cpu_backend="auto")
    check_agreement(model, right, rtol=1e-3, atol=1e-4)  # kernels sum in another order
    model.hybrimoe.close()


def test_files_of_families_whose_values_are_changed_are_refused(tmp_path: Path) -> None:
    export_gguf(shrunk_model("olmoe"), tmp_path / "model.gguf")
    shrunk_model("exaone_moe").config.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="exaone_moe .* checkpoint directory"):
        plain(tmp_path / "model.gguf", tmp_path)
