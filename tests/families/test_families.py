"""Every family, loaded from GGUF and injected, gives the plain transformers model's logits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loading import check_same, injected, logits, plain

from hybrimoe_plugin.hosts.transformers import load_plain_model

SCHEDULERS = ("hybrimoe", "greedy", "static", "accelerator_only", "cpu_only")
CACHES = ("mrs", "lru", "lfu", "static")
PREFETCHERS = ("impact", "score", "off")
POLICIES = list(itertools.product(CACHES, PREFETCHERS))
RATIOS = (0.0, 0.25, 0.5, 1.0)
PROMPT = tiny.tokens(9)
STEPS = tiny.tokens(3, seed=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in (*tiny.FAMILIES, *tiny.DENSE):
        folder = tmp_path_factory.mktemp(family)
        made[family] = tiny.write(folder, family)
    return made


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.DENSE])
def test_weights_survive_the_round_trip(family: str, files: dict[str, Path]) -> None:
    loaded, tokenizer = load_plain_model(None, files[family], dtype="float32", progress=False)
    prompt = tiny.tokens(17, batch=2)
    check_same(loaded, tiny.model(family), prompt, prompt[:, :2])
    assert tokenizer is None
    ends = loaded.generation_config.eos_token_id
    assert ends is None or loaded.config.eos_token_id is not None


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_equal_the_plain_forward(
    family: str, scheduler: str, files: dict[str, Path]
) -> None:
    wanted = logits(tiny.model(family), PROMPT, STEPS)
    # Each scheduler meets every cache, prefetch and ratio over the families; the engine's tests
    # take the full product.
    shift = list(tiny.FAMILIES).index(family) + SCHEDULERS.index(scheduler)
    for number, ratio in enumerate(RATIOS):
        cache, prefetch = POLICIES[(3 * number + shift) % len(POLICIES)]
        model = injected(
            files[family],
            accelerator="emulated",
            scheduler=scheduler,
            cache=cache,
            prefetch=prefetch,
            cache_ratio=ratio,
        )
        torch.testing.assert_close(logits(model, PROMPT, STEPS), wanted)
        stats = model.hybrimoe.stats()
        assert stats.activations == stats.experts_cpu + stats.experts_accelerator > 0
        if scheduler == "accelerator_only":
            assert stats.experts_cpu == 0
        model.hybrimoe.close()


@pytest.mark.parametrize(
    ("family", "export"),
    [
        ("mixtral", {"stacked": False}),
        ("mixtral", {"shard_tensors": 7}),
        ("deepseek_v3", {"split_kv_b": True}),
        ("deepseek_v2_lite", {"split_kv_b": True, "stacked": False}),
    ],
)
def test_other_layouts_of_the_same_model(
    family: str, export: dict[str, Any], tmp_path: Path
) -> None:
    tiny.write(tmp_path, family, **export)
    right = tiny.model(family)
    model = injected(tmp_path)
    check_same(model, right, PROMPT, STEPS)
    check_same(plain(tmp_path), right, PROMPT, STEPS)
    model.hybrimoe.close()


def test_two_models_live_side_by_side_and_restore(files: dict[str, Path]) -> None:
    mixtral, qwen = tiny.model("mixtral"), tiny.model("qwen3_moe")
    first = injected(files["mixtral"])
    second = injected(files["qwen3_moe"])
    for _ in range(2):
        check_same(first, mixtral, PROMPT)
        check_same(second, qwen, PROMPT)
    assert first.hybrimoe.stats().calls == 4
    assert second.hybrimoe.stats().calls == 4
    first.hybrimoe.restore()
    restored = first.model.layers[0].mlp
    before = mixtral.model.layers[0].mlp
    assert type(restored.experts) is type(before.experts)
    assert not restored.gate._forward_hooks
    check_same(second, qwen, PROMPT)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 2, "do_sample": False},
    ],
)
def test_generate_streams_samples_and_stops(
    options: dict[str, Any], files: dict[str, Path]
) -> None:
    model = injected(files["mixtral"])
    ends = {"pad_token_id": 0, "eos_token_id": 95}
    answers = []
    for built in (model, tiny.model("mixtral")):
        torch.manual_seed(0)
        answers.append(built.generate(tiny.tokens(5), max_new_tokens=8, **ends, **options))
    assert torch.equal(*answers)
    model.hybrimoe.close()


@pytest.mark.parametrize("settings", [{}, {"dense": "dequantised"}, {"dense": "plain"}])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_tied_embeddings_with_and_without_a_stored_table(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    tied = {"tie_word_embeddings": True}
    path = tiny.write(tmp_path, family, changes=tied)
    model = injected(path, **settings)
    check_same(model, tiny.model(family, **tied), PROMPT, STEPS)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.hybrimoe.close()
