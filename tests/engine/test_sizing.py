"""Accelerator memory: attention's cache, staging for long prompts, one pool a device, and running
out of it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import needs
import pytest
import tiny_experts
import torch
from engines import HIDDEN, LAYERS, WEIGHTS, build, plain, run
from torch import nn

from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.engine import assemble, cpu_choice
from hybrimoe_plugin.engine.cpu_choice import choose_cpu
from hybrimoe_plugin.engine.sizing import (
    MOST_STAGING_SLOTS,
    STAGING_SLOTS,
    cache_quotas,
    kv_cache_bytes,
    staging_slots,
)
from hybrimoe_plugin.errors import BackendError, BudgetError, ConfigError
from hybrimoe_plugin.operators import bind as bind_module
from hybrimoe_plugin.operators.bind import bind
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.mla import FusedMLA
from hybrimoe_plugin.policy.profile import MachineProfile, Side
from hybrimoe_plugin.replay.profile_files import load_profile


def test_attention_cache_of_known_models() -> None:
    mixtral = SimpleNamespace(
        num_attention_heads=32,
        num_key_value_heads=8,
        hidden_size=4096,
        head_dim=None,
        num_hidden_layers=32,
    )
    assert kv_cache_bytes(mixtral, 4096) == 2 * 2 * 8 * 128 * 32 * 4096  # 512 MiB
    deepseek = SimpleNamespace(
        num_attention_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_hidden_layers=27,
    )
    expanded = 2 * 16 * (128 + 64 + 128) * 1000
    assert kv_cache_bytes(deepseek, 1000) == 27 * expanded
    assert kv_cache_bytes(deepseek, 1000, latent=True) == 27 * 2 * (512 + 64) * 1000 + expanded
    assert kv_cache_bytes(None, 4096) == 0


def test_staging_grows_with_the_cache_and_counts() -> None:
    assert [staging_slots(slots) for slots in (0, 64, 80, 10_000)] == [
        STAGING_SLOTS,
        4,
        5,
        MOST_STAGING_SLOTS,
    ]
    free = 400 * 1000
    quotas = cache_quotas(Settings(), 128, [1000] * 4, free)
    assert sum(quotas) + staging_slots(sum(quotas)) <= 0.9 * free / 1000


def test_out_of_memory_shrinks_the_cache_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    engine, routers = build(cache_ratio=0.5)
    before = sum(engine.controller.pool.quotas)
    failures = iter([True, False, True, False])
    real = engine.accelerator.compute

    def compute(*args: object) -> torch.Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    engine.accelerator.compute = compute
    with caplog.at_level(logging.WARNING):
        for seed in range(6):
            run(engine, routers, 1 + seed % 3, seed)
    left = sum(engine.controller.pool.quotas)
    assert 0 < left < before
    assert caplog.text.count("the cache shrinks from") == 2
    assert engine.accelerator._buffer.shape[0] == left + engine.controller.pool.staging


def test_a_smaller_pool_that_does_not_fit_either_is_made_smaller_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, routers = build(cache_ratio=0.5)
    real = engine.accelerator.allocate
    asked = []

    def allocate(slots: int, layers: object) -> None:
        asked.append(slots)
        if len(asked) < 3:
            raise BudgetError("in pieces")
        real(slots, layers)

    monkeypatch.setattr(engine.accelerator, "allocate", allocate)
    engine._shrink(torch.OutOfMemoryError("CUDA out of memory"))
    assert asked[0] > asked[1] > asked[2]
    run(engine, routers, 3, 0)


def test_out_of_memory_without_a_cache_is_raised() -> None:
    engine, routers = build(cache_ratio=0.25, scheduler="accelerator_only")

    def compute(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.accelerator.compute = compute
    with pytest.raises(torch.OutOfMemoryError):
        run(engine, routers, 2, 0)
    assert sum(engine.controller.pool.quotas) == 0
    engine.controller.pool.check_integrity()


class Block(nn.Module):
    def __init__(self, experts: HybriMoEExperts) -> None:
        super().__init__()
        self.experts = experts
        self.gate = nn.Linear(1, 1)


def model(kwargs: list[dict[str, object]]) -> nn.Module:
    """One operator for each set of kwargs, with this file's weights."""
    config = SimpleNamespace(hidden_act="silu", hidden_size=HIDDEN, num_experts_per_tok=2)
    layers = nn.ModuleList()
    for index, given in enumerate(kwargs):
        operator = HybriMoEExperts(f"layers.{index}.experts", None, config, **given)  # type: ignore[arg-type]
        operator.weights = WEIGHTS[index % LAYERS]
        layers.append(Block(operator))
    whole = nn.Module()
    whole.layers = layers
    return whole


def test_each_device_has_its_own_pool_and_budget() -> None:
    """Rules with two devices and uneven budgets; both emulated here."""
    size = WEIGHTS[0].spec.expert_bytes
    common = {
        "accelerator": "emulated",
        "cpu_backend": "torch",
        "budget": "layer",
        "scheduler": "static",
    }
    first = {
        **common,
        "prefill_device": "cuda:0",
        "generate_device": "cuda:0",
        "cache_bytes": size * (4 + 8),
    }
    second = {
        **common,
        "prefill_device": "cuda:1",
        "generate_device": "cuda:1",
        "cache_bytes": size * (4 + 2),
    }
    whole = model([first, first, second])
    router = SimpleNamespace(
        scores=lambda: None,
        predicts=True,
        predict=lambda hidden: torch.zeros(len(hidden), 2, dtype=torch.int64),
    )
    handle = bind(whole, routers=lambda *_: router, progress=False)
    try:
        assert [len(engine.layers) for engine in handle.engines] == [2, 1]
        assert [sum(engine.controller.pool.quotas) for engine in handle.engines] == [8, 2]
        assert handle.engines[0].accelerator is not handle.engines[1].accelerator
        pools = [getattr(engine.cpu, "backend", engine.cpu) for engine in handle.engines]
        assert pools[0] is pools[1], "two pools of CPU workers would fight for the cores"
        for index, layer in enumerate(
            whole.layers
        ):  # layers 0 and 2 have the same number in their engines
            hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(index))
            ids = torch.tensor([[0, 7], [3, 4], [6, 5]])
            routing = torch.full((3, 2), 0.5)
            found = layer.experts(hidden, ids, routing)
            torch.testing.assert_close(
                found, plain(WEIGHTS[index], hidden, ids, routing), rtol=1e-4, atol=1e-5
            )
        assert all(engine.controller.counters.experts_cpu for engine in handle.engines)
        operators = [module for module in whole.modules() if isinstance(module, HybriMoEExperts)]
        assert [operator._engine for operator in operators] == [handle.engines[0]] * 2 + [
            handle.engines[1]
        ]
    finally:
        handle.close()


def test_sizing_leaves_room_for_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free, less the attention cache of the layers that live on this device."""
    asked: list[int | None] = []

    def quotas(*given: Any) -> list[int]:
        asked.append(given[-1])
        raise BackendError("seen")

    device = SimpleNamespace(name="cuda", on_cpu=lambda layers: {})
    monkeypatch.setattr(assemble, "quotas_beside", quotas)
    monkeypatch.setattr(assemble, "make_accelerator", lambda *_, **__: device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000_000, 20_000_000))
    config = SimpleNamespace(
        num_attention_heads=2, num_key_value_heads=2, hidden_size=HIDDEN, num_hidden_layers=4
    )
    whole = model([{"accelerator": "cuda", "generate_device": "cuda:1", "context": 1000}] * 2)
    whole.config = config
    with pytest.raises(BackendError, match="seen"):
        bind(whole, routers=lambda *_: SimpleNamespace(), progress=False)
    assert asked == [10_000_000 - 2 * 2 * HIDDEN * 4 * 1000]
    # What keeps latents needs room for latents.
    sizes = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 16}
    whole.config = SimpleNamespace(
        num_attention_heads=8, kv_lora_rank=64, num_hidden_layers=4, **sizes
    )
    for kept in (8 * 64 * 4, 80 * 4 + 8 * 64):
        with pytest.raises(BackendError, match="seen"):
            bind(whole, routers=lambda *_: SimpleNamespace(), progress=False)
        assert asked[-1] == 10_000_000 - 2 * kept * 1000
        whole.attention = FusedMLA.__new__(FusedMLA)
        torch.nn.Module.__init__(whole.attention)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_attention_beside_a_gpu_is_kept_from_cudnn(
    on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It plans for every new number of keys, and decode has one at each token."""
    asked: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)

    def build(*_: object, **__: object) -> tuple[object, object]:
        device = SimpleNamespace(type="cuda" if on_cuda else "cpu")
        engine = SimpleNamespace(
            accelerator=SimpleNamespace(device=device),
            cpu=SimpleNamespace(workers=0),
            close=lambda: None,
        )
        return engine, None

    monkeypatch.setattr(bind_module, "build_engine", build)
    bind(model([{}] * 2), routers=lambda *_: SimpleNamespace(), progress=False)
    assert asked == ([False] if on_cuda else [])


def test_kernels_are_chosen_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for activations in ("auto", "float", "int8"):
        found = make_accelerator("emulated", cpu, activations=activations)
        assert isinstance(found.kernels, TorchKernels)
        assert found.kernels.int8 == (activations == "int8")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1|not installed"):
        make_accelerator("emulated", cpu, "triton")
    with pytest.raises(ConfigError, match="kernels"):
        Settings(kernels="cutlass")
    spec = ExpertSpec(64, 64, 2, 1, "Q8_K", "Q8_0", "Q8_0", 1, 1, 1)
    assert "Q8_K" in str(TorchKernels().refusal(spec))


def side(us: float) -> MachineProfile:
    return replace(load_profile("rtx4090-desktop"), cpu=Side(10.0, (1,), (us,), 4))


@pytest.mark.parametrize("own", ["ggml", "operations"])
@pytest.mark.parametrize(("kt_us", "own_us"), [(50.0, 80.0), (80.0, 50.0)])
def test_beside_an_accelerator_the_quickest_cpu_backend_is_taken(
    kt_us: float, own_us: float, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.kt_kernel()
    monkeypatch.setattr(cpu_choice, "compiled", lambda: own == "operations")
    wanted = "kt" if kt_us < own_us else own
    profiles = {"kt": side(kt_us), own: side(own_us)}
    asked: list[str] = []

    def ensure(_weights: object, backend: str, *_: object, **__: object) -> MachineProfile:
        asked.append(backend)
        return profiles[backend]

    monkeypatch.setattr(cpu_choice, "ensure_profile", ensure)
    accelerator = make_accelerator("emulated", torch.device("cpu"))
    types = ("Q8_0",) * 3
    fits = tiny_experts.layer(types=types)
    refused = tiny_experts.layer(intermediate=96, types=types)
    assert choose_cpu(Settings(), [fits], accelerator) == (wanted, profiles[wanted])
    assert sorted(asked) == sorted(["kt", own])
    assert choose_cpu(Settings(), [refused], accelerator)[0] == own, (
        "kt-kernel takes multiples of 256 alone"
    )
    assert choose_cpu(Settings(), [fits], None)[0] == own
    assert choose_cpu(Settings(cpu_backend="kt"), [fits], accelerator)[0] == "kt"
    assert choose_cpu(Settings(profile="rtx4090-desktop"), [refused], accelerator) == (
        own,
        load_profile("rtx4090-desktop"),
    )


def test_experts_that_kt_kernel_refuses_are_computed_by_ggml_beside_an_accelerator() -> None:
    """DeepSeek-V2-Lite's are 1408 wide: beside a GPU they were left to the torch reference."""
    needs.kt_kernel()
    weights = [
        tiny_experts.layer(hidden=HIDDEN, intermediate=96, types=("Q8_0",) * 3, index=index)
        for index in (0, 1)
    ]
    whole = model([{"accelerator": "emulated", "cache_ratio": 0.25, "scheduler": "static"}] * 2)
    for layer, stored in zip(whole.layers, weights, strict=True):
        layer.experts.weights = stored
    router = SimpleNamespace(
        scores=lambda: None,
        predicts=True,
        predict=lambda hidden: torch.zeros(len(hidden), 2, dtype=torch.int64),
    )
    handle = bind(whole, routers=lambda *_: router, progress=False)
    try:
        (engine,) = handle.engines
        assert isinstance(engine.cpu, GgmlExperts)
        assert engine.cpu.workers > 0
        for seed, tokens in enumerate((1, 1, 5, 64)):
            generator = torch.Generator().manual_seed(seed)
            hidden, routing = (
                torch.randn(tokens, size, generator=generator) for size in (HIDDEN, 2)
            )
            ids = torch.rand(tokens, 8, generator=generator).topk(2).indices
            for layer, stored in zip(whole.layers, weights, strict=True):
                found = layer.experts(hidden, ids, routing)
                wanted = plain(stored, hidden, ids, routing)
                assert float((found - wanted).norm() / wanted.norm()) < 0.03
        assert engine.controller.counters.experts_cpu
        assert engine.controller.counters.experts_accelerator
    finally:
        handle.close()
