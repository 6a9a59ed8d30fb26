"""What takes the place of missing modules computes what they would; it needs no ktransformers."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.hosts.ktransformers.standins import (
    cpuinfer_ext,
    flash_attn,
    ktransformers_ops,
    triton_attention,
)

GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> torch.Tensor:
    """[B, Tq, heads, D] written out."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if causal:
        rows, columns = q.shape[1], k.shape[1]
        allowed = torch.arange(columns)[None] <= torch.arange(rows)[:, None] + columns - rows
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize(("queries", "keys", "heads"), [(5, 5, 4), (3, 7, 2), (1, 6, 1)])
def test_flash_attention(queries: int, keys: int, heads: int) -> None:
    q, k, v = rand(2, queries, 4, 8), rand(2, keys, heads, 8), rand(2, keys, heads, 8)
    for causal in (True, False):
        found = flash_attn.flash_attn_func(q, k, v, softmax_scale=0.3, causal=causal)
        torch.testing.assert_close(found, attention(q, k, v, causal, 0.3))


def test_flash_attention_over_a_cache_sees_only_what_is_filled() -> None:
    q, k, v = rand(2, 1, 4, 8), rand(2, 9, 2, 8), rand(2, 9, 2, 8)
    for lengths in ([4, 7], [9, 1]):
        found = flash_attn.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=torch.tensor(lengths), causal=True
        )
        for row, length in enumerate(lengths):
            part = slice(row, row + 1)
            wanted = attention(q[part], k[part, :length], v[part, :length], False, 8**-0.5)
            torch.testing.assert_close(found[part], wanted)
    one = flash_attn.flash_attn_with_kvcache(q[:1], k[:1], v[:1], cache_seqlens=torch.tensor([3]))
    torch.testing.assert_close(one, attention(q[:1], k[:1, :3], v[:1, :3], False, 8**-0.5))


def test_flash_attention_refuses_what_it_does_not_do() -> None:
    q = rand(1, 2, 2, 8)
    with pytest.raises(BackendError, match="sliding windows"):
        flash_attn.flash_attn_func(q, q, q, window_size=(4, 4))
    with pytest.raises(BackendError, match="one query"):
        flash_attn.flash_attn_with_kvcache(q, q, q)
    with pytest.raises(BackendError, match="padded batches"):
        flash_attn.flash_attn_varlen_func(q, q, q)


@pytest.mark.parametrize("length", [1, 4, 5, 11])
def test_latent_attention_over_pages(length: int) -> None:
    rank, rotary, page = 6, 2, 4
    cache = rand(5, page, 1, rank + rotary)
    pages = torch.tensor([[3, 0, 4]], dtype=torch.int32)
    q, out = rand(1, 2, rank + rotary), torch.zeros(1, 1, 2, rank)
    triton_attention.decode_attention_fwd_grouped(
        q,
        cache,
        cache[..., :rank],
        out,
        pages,
        torch.tensor([length]),
        torch.empty(0),
        4,
        0.4,
        page,
    )
    keys = cache[pages[0].long()].reshape(-1, rank + rotary)[:length]
    wanted = ((q[0] @ keys.T) * 0.4).softmax(-1) @ keys[:, :rank]
    torch.testing.assert_close(out[0, 0], wanted)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS"])
def test_dequantisation_on_the_device(name: str) -> None:
    kind = GGMLQuantizationType[name]
    try:
        stored = quantize(rand(2, 512).numpy(), kind)
    except NotImplementedError:
        from gguf.constants import GGML_QUANT_SIZES

        size = 4 * GGML_QUANT_SIZES[kind][1]
        stored = np.random.default_rng(0).integers(
            0, 60, (1, size), dtype=np.uint8
        )  # small halves, no infinities
    function = getattr(ktransformers_ops, f"dequantize_{name.lower()}")
    found = function(torch.from_numpy(stored.reshape(-1)), 0, torch.device("cpu"))
    np.testing.assert_array_equal(found.numpy().reshape(-1), dequantize(stored, kind).reshape(-1))


def test_marlin_says_what_to_do() -> None:
    with pytest.raises(BackendError, match="KLinearTorch"):
        ktransformers_ops.gptq_marlin_gemm(1, 2, 3)


def test_cpu_experts_on_pointers() -> None:
    pytest.importorskip("kt_kernel", reason="kt-kernel is not installed", exc_type=Exception)
    from hybrimoe_plugin.hosts.ktransformers.standins import cpuinfer_ext

    experts, top_k, hidden, inner, count = 4, 2, 64, 256, 3
    kind = GGMLQuantizationType.Q8_0
    gate, up, down = (
        rand(experts, *shape) * 0.1 for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    stored = [np.ascontiguousarray(quantize(part.numpy(), kind)) for part in (gate, up, down)]
    config = cpuinfer_ext.MOEConfig(
        experts,
        top_k,
        hidden,
        inner,
        64,
        10,
        1024,
        *(part.ctypes.data for part in stored),
        kind,
        kind,
        kind,
        30,
    )
    moe, infer = cpuinfer_ext.MOE(config), cpuinfer_ext.CPUInfer(1)
    infer.submit(moe.warm_up())
    infer.sync()
    states = rand(count, hidden).bfloat16()
    ids = torch.tensor([[0, 3], [1, 2], [3, 1]])
    weights = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.2, 0.8]])
    output = torch.empty_like(states)
    pointers = (part.data_ptr() for part in (ids, weights, states, output))
    infer.submit_with_cuda_stream(0, moe.forward(count, top_k, *pointers))
    infer.sync_with_cuda_stream(0)
    wanted = torch.zeros(count, hidden)
    for token in range(count):
        for place in range(top_k):
            expert, x = ids[token, place], states[token].float()
            act = torch.nn.functional.silu(gate[expert] @ x) * (up[expert] @ x)
            wanted[token] += weights[token, place] * (down[expert] @ act)
    # The kernels quantise activations to 8 bits: 1-2 %.
    assert (output.float() - wanted).norm() / wanted.norm() < 0.03


def test_cpu_experts_refuse_what_would_be_garbage() -> None:
    from hybrimoe_plugin.hosts.ktransformers.standins import cpuinfer_ext

    buffer = (ctypes.c_uint8 * (64 * 256 * 34 // 32))()
    kind, address = int(GGMLQuantizationType.Q8_0), ctypes.addressof(buffer)
    config = cpuinfer_ext.MOEConfig(
        1, 1, 64, 256, 64, 10, 1024, address, address, address, kind, kind, kind, 1
    )
    with pytest.raises(BackendError, match="only bfloat16"):
        config.weights()
    with pytest.raises(BackendError, match="KLinearTorch"):
        cpuinfer_ext.linear.LinearConfig(1, 2)
    with pytest.raises(BackendError, match="long_context"):
        _ = cpuinfer_ext.kvcache.KVCache


@pytest.mark.parametrize("stream", [0, 4711])
def test_the_stream_that_writes_the_inputs_is_awaited(
    stream: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default stream's pointer is null, from which torch's `ExternalStream` makes a stream of
    its own.
    """
    awaited = []

    class Stream:
        def __init__(self, pointer: int) -> None:
            self.name = "another" if pointer == 0 else pointer

        def synchronize(self) -> None:
            awaited.append(self.name)

    default = Stream(1)
    default.name = "default"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: default)
    cpuinfer_ext._wait_for(stream)
    assert awaited == ["default" if stream == 0 else stream]
