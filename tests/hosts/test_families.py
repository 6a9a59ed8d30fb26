"""Every family, loaded from GGUF and injected, gives the logits of the plain transformers
forward.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from steps import step

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.hosts.transformers import load_plain_model

SCHEDULERS = ("hybrimoe", "greedy", "static", "accelerator_only", "cpu_only")
POLICIES = list(itertools.product(("mrs", "lru", "lfu", "static"), ("impact", "score", "off")))


def forward(model: Any, prompt: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Logits of a prefill and of single-token decode steps."""
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        logits = [out.logits]
        for ids in steps.T:
            out = step(model, ids[:, None], cache_in(out))
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in (*tiny.FAMILIES, *tiny.DENSE):
        made[family] = tiny.write(tmp_path_factory.mktemp(family), family)
    return made


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.DENSE])
def test_weights_survive_the_round_trip(family: str, files: dict[str, Path]) -> None:
    loaded, tokenizer = load_plain_model(None, files[family], dtype="float32", progress=False)
    original = tiny.model(family)
    prompt = tiny.tokens(17, batch=2)
    torch.testing.assert_close(
        forward(loaded, prompt, prompt[:, :2]), forward(original, prompt, prompt[:, :2])
    )
    assert tokenizer is None
    assert loaded.generation_config.eos_token_id is None or loaded.config.eos_token_id is not None


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_equal_the_plain_forward(
    family: str, scheduler: str, files: dict[str, Path]
) -> None:
    prompt, steps = tiny.tokens(9), tiny.tokens(3, seed=1)
    wanted = forward(tiny.model(family), prompt, steps)
    # Each scheduler meets every cache, prefetch and ratio over the families; the engine's tests
    # take the full product.
    shift = list(tiny.FAMILIES).index(family) + SCHEDULERS.index(scheduler)
    for turn, ratio in enumerate((0.0, 0.25, 0.5, 1.0)):
        cache, prefetch = POLICIES[(3 * turn + shift) % len(POLICIES)]
        model, _ = load_model(
            None,
            files[family],
            dtype="float32",
            cpu_backend="torch",
            accelerator="emulated",
            scheduler=scheduler,
            cache=cache,
            prefetch=prefetch,
            cache_ratio=ratio,
            progress=False,
        )
        torch.testing.assert_close(forward(model, prompt, steps), wanted)
        stats = model.hybrimoe.stats()
        assert stats.activations == stats.experts_cpu + stats.experts_accelerator > 0
        if scheduler == "accelerator_only":
            assert stats.experts_cpu == 0
        model.hybrimoe.close()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kt_kernel_is_within_its_activation_error(family: str, tmp_path: Path) -> None:
    needs.kt_kernel()
    path = tiny.write(tmp_path, family, types=lambda name: "Q8_0" if "_exps" in name else "F32")
    plain, _ = load_plain_model(None, path, dtype="float32", progress=False)
    model, _ = load_model(None, path, dtype="float32", cpu_backend="kt", progress=False)
    ids = tiny.tokens(12)

    seen: dict[str, list[torch.Tensor]] = {"plain": [], "kt": []}
    for key, built in (("plain", plain), ("kt", model)):
        built.model.layers[1].mlp.experts.register_forward_hook(
            lambda _m, _a, out, key=key: seen[key].append(out)
        )
    routed: list[tuple[torch.Tensor, ...]] = []
    plain.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda _m, args: routed.append(args)
    )
    with torch.no_grad():
        plain(ids)
        # The same inputs and routing: a router's near tie must not hide or fake an error of the
        # kernel.
        model.model.layers[1].mlp.experts(*routed[0])
    wanted, found = seen["plain"][0], seen["kt"][0]
    assert (found - wanted).norm() / wanted.norm() < 0.02
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
    prompt, steps = tiny.tokens(7), tiny.tokens(2, seed=1)
    wanted = forward(tiny.model(family), prompt, steps)
    model, _ = load_model(tmp_path, dtype="float32", cpu_backend="torch", progress=False)
    torch.testing.assert_close(forward(model, prompt, steps), wanted)
    plain, _ = load_plain_model(tmp_path, dtype="float32", progress=False)
    torch.testing.assert_close(forward(plain, prompt, steps), wanted)
    model.hybrimoe.close()


def test_two_models_live_side_by_side_and_restore(files: dict[str, Path]) -> None:
    names = ("mixtral", "qwen3_moe")
    models = [
        load_model(None, files[name], dtype="float32", cpu_backend="torch", progress=False)[0]
        for name in names
    ]
    ids = tiny.tokens(6)
    for _ in range(2):
        for name, model in zip(names, models, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, tiny.model(name)(ids).logits)
    assert models[0].hybrimoe.stats().calls == models[1].hybrimoe.stats().calls == 4
    before = type(tiny.model("mixtral").model.layers[0].mlp.experts)
    models[0].hybrimoe.restore()
    assert type(models[0].model.layers[0].mlp.experts) is before
    assert not models[0].model.layers[0].mlp.gate._forward_hooks
    with torch.no_grad():
        torch.testing.assert_close(models[1](ids).logits, tiny.model("qwen3_moe")(ids).logits)


def test_generate_streams_samples_and_stops(files: dict[str, Path]) -> None:
    model, _ = load_model(
        None, files["mixtral"], dtype="float32", cpu_backend="torch", progress=False
    )
    plain = tiny.model("mixtral")
    ids = tiny.tokens(5)
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 2, "do_sample": False},
    ):
        answers = []
        for built in (model, plain):
            torch.manual_seed(0)
            answers.append(
                built.generate(ids, max_new_tokens=8, pad_token_id=0, eos_token_id=95, **options)
            )
        assert torch.equal(*answers)
    model.hybrimoe.close()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_tied_embeddings_with_and_without_a_stored_table(family: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path, family, changes={"tie_word_embeddings": True})
    prompt, steps = tiny.tokens(9), tiny.tokens(2, seed=1)
    wanted = forward(tiny.model(family, tie_word_embeddings=True), prompt, steps)
    for settings in (
        {"cpu_backend": "torch"},
        {"cpu_backend": "torch", "linears": "plain"},
        {"dense": "plain"},
    ):
        model, _ = load_model(
            None, path, dtype="float32", progress=False, **{"cpu_backend": "torch", **settings}
        )
        torch.testing.assert_close(forward(model, prompt, steps), wanted)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.hybrimoe.close()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_matrices_as_stored_are_within_their_activation_error(family: str, tmp_path: Path) -> None:
    """Dense matrices in Q8_0, one module at a time: a router's near tie must not hide or fake an
    error.
    """
    needs.kt_kernel()
    # 48 columns are no whole number of blocks.
    path = tiny.write(tmp_path, family, types=lambda name: "F32" if "attn_q_b" in name else "Q8_0")
    plain, _ = load_plain_model(None, path, dtype="float32", progress=False)
    model, _ = load_model(
        None, path, dtype="float32", cpu_backend="torch", linears="quantised", progress=False
    )
    seen: dict[str, list[torch.Tensor]] = {"plain": [], "stored": []}
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    plain.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _m, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    plain.model.layers[1].self_attn.register_forward_hook(
        lambda _m, _a, out: seen["plain"].append(out[0])
    )
    hidden = torch.randn(1, 5, plain.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain(tiny.tokens(12), use_cache=False)
        args, kwargs = inputs[0]
        seen["stored"].append(model.model.layers[1].self_attn(*args, **kwargs)[0])
        head, stored_head = plain.lm_head(hidden), model.lm_head(hidden)
        table, stored_table = (
            plain.model.embed_tokens(tiny.tokens(12)),
            model.model.embed_tokens(tiny.tokens(12)),
        )
    for found, wanted in (
        (seen["stored"][0], seen["plain"][0]),
        (stored_head, head),
        (stored_table, table),
    ):
        assert (found - wanted).norm() / wanted.norm() < 0.03
    model.hybrimoe.close()
