"""Operators for dense modules: stored matrices against dequantised ones, the growing cache,
switches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from steps import prefill, step
from transformers.cache_utils import DynamicCache, DynamicLayer

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.attend import attend
from hybrimoe_plugin.compute.attention.kv_cache import GrowingLayer, cache_in, use_growing_layer
from hybrimoe_plugin.compute.cpu.ggml_function import GgmlFunction
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.hosts.transformers import load_plain_model
from hybrimoe_plugin.operators.attention import FusedAttention
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.linear import GgmlLinear
from hybrimoe_plugin.operators.norm import FusedRMSNorm

needs.kt_kernel()


def q8(name: str) -> str:
    return "F32" if "ffn_gate_inp" in name else "Q8_0"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("mixtral"), "mixtral", types=q8)


def load(path: Path, **settings: Any) -> Any:
    return load_model(None, path, progress=False, **settings)[0]


def test_matrices_stay_as_stored_and_in_place(mixtral: Path) -> None:
    model = load(mixtral, accelerator="none")
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, FusedAttention) and isinstance(attention.v_proj, GgmlLinear)
    # V is not rotated, so its bytes are the mapping's own; what is not large is float32.
    assert attention.v_proj.stored is not None and not attention.v_proj.stored.data.flags.owndata
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert not any(value.numel() > 8 * 64 for value in model.parameters())
    model.hybrimoe.close()


@pytest.mark.parametrize(
    ("backend", "limit"),
    [
        ("ggml", 1e-2),  # 8-bit activations round alike row by row; sums differ in order alone
        ("auto", 5e-2),  # the operations round those of many rows to bfloat16
    ],
)
def test_one_token_and_many_give_the_same_function(
    mixtral: Path, backend: str, limit: float
) -> None:
    model = load(mixtral, accelerator="none", cpu_backend=backend)
    ids = tiny.tokens(12)
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :7], use_cache=True)
        parts = [out.logits]
        for at in range(7, 12):
            out = step(model, ids[:, at : at + 1], cache_in(out))
            parts.append(out.logits)
    found = torch.cat(parts, dim=1)
    assert float((found - whole).norm() / whole.norm()) < limit
    model.hybrimoe.close()


@pytest.mark.parametrize("shape", [(1, 1, 64), (64,), (1, 3, 64)])
def test_norms_equal_torch_s_own(mixtral: Path, shape: tuple[int, ...]) -> None:
    model = load(mixtral, accelerator="none")
    norm = model.model.layers[1].input_layernorm
    assert isinstance(norm, FusedRMSNorm) and norm.ggml is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=generator))
        xs = [torch.randn(shape, generator=generator) * scale for scale in (1e-3, 1.0, 300.0)]
        found = [norm(x) for x in xs]
        norm._function = None
        for x, y in zip(xs, found, strict=True):  # an earlier result must survive later calls
            torch.testing.assert_close(y, norm(x), rtol=1e-5, atol=1e-6)
    model.hybrimoe.close()


def test_calls_of_every_mode_may_follow_each_other(mixtral: Path) -> None:
    """What inference mode makes cannot be written to in others, and no gradients must pile up in
    graphs' buffers.
    """
    model = load(mixtral, accelerator="none")
    ids, found = tiny.tokens(4), []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            cache = prefill(model, ids)
            found.append(step(model, ids[:, :1], cache).logits.detach())
    for logits in found[1:]:
        assert torch.equal(logits, found[0])
    graphs = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, GgmlFunction)
    ]
    nodes = [
        part
        for each in graphs
        for _, given, gives in each._kept.values()
        for part in (given, *gives)
    ]
    assert nodes and not any(node.value.requires_grad for node in nodes)
    model.hybrimoe.close()


def test_an_operator_is_within_its_activation_error(mixtral: Path) -> None:
    """Module by module on the same inputs: a router's near tie must not hide or fake an error."""
    plain, _ = load_plain_model(None, mixtral, dtype="float32", progress=False)
    model = load(mixtral, accelerator="none")
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    ids = tiny.tokens(9, batch=2)
    with torch.no_grad():
        position = plain.model.rotary_emb(x, torch.arange(9)[None])
        pairs = [
            (
                model.model.layers[0].self_attn(x, position)[0],
                plain.model.layers[0].self_attn(x, position, None)[0],
            ),
            (model.lm_head(x), plain.lm_head(x)),
            (model.model.embed_tokens(ids), plain.model.embed_tokens(ids)),
            (model.model.norm(x), plain.model.norm(x)),
        ]
    for found, wanted in pairs:
        assert float((found - wanted).norm() / wanted.norm()) < 0.02
    torch.testing.assert_close(*pairs[2])
    torch.testing.assert_close(*pairs[3])
    with pytest.raises(IndexError, match="0 to 95"):
        model.model.embed_tokens(torch.tensor([[96]]))
    model.hybrimoe.close()


def test_switches_choose_the_twins(mixtral: Path) -> None:
    ids = tiny.tokens(8)
    plain = load(mixtral, dense="plain", dtype="float32", cpu_backend="torch")
    assert not any(isinstance(module, DenseOperator) for module in plain.modules())
    lean = load(mixtral, dense="dequantised", dtype="float32", cpu_backend="torch")
    assert any(isinstance(module, FusedAttention) for module in lean.modules())
    assert not any(isinstance(module, GgmlLinear) for module in lean.modules())
    with torch.no_grad():
        torch.testing.assert_close(lean(ids).logits, plain(ids).logits)
    for model in (plain, lean):
        model.hybrimoe.close()
    with pytest.raises(ConfigError, match="load_model: dense: expected one of"):
        load(mixtral, dense="sometimes")


@pytest.mark.parametrize("context", [7, 4096])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_of_a_group_attend_as_tokens(context: int, masked: bool) -> None:
    """Small and large keys take different ways; both are the textbook's."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1, 16, generator=generator)
    key, value = (torch.randn(2, 2, context, 16, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 1, context, generator=generator) < 0.5 if masked else None
    scores = query @ key.repeat_interleave(3, 1).transpose(2, 3) * 0.25
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    wanted = scores.softmax(-1) @ value.repeat_interleave(3, 1)
    torch.testing.assert_close(attend(query, key, value, mask, 0.25, grouped=True), wanted)


def test_the_growing_layer_is_the_dynamic_one() -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)

    def both(count: int, batch: int) -> None:
        new = torch.randn(batch, 3, count, 8, generator=generator)
        for found, wanted in zip(ours.update(new, -new), theirs.update(new, -new), strict=True):
            assert torch.equal(found, wanted)

    both(5, 2)
    for _ in range(3):
        both(1, 2)
    both(300, 2)  # more than the spare room
    held = ours.keys
    before = held.clone()
    both(1, 2)
    assert torch.equal(held, before)
    for layer in (ours, theirs):
        layer.crop(-4)
    both(2, 2)
    for layer in (ours, theirs):
        layer.batch_select_indices(torch.tensor([1]))
    both(1, 1)
    for layer in (ours, theirs):
        layer.reorder_cache(torch.tensor([0]))
    both(3, 1)
    assert ours.get_seq_length() == theirs.get_seq_length()
    ours.reset()
    fresh = GrowingLayer()
    assert ours.get_seq_length() == 0
    new = torch.randn(
        2, 3, 4, 8, generator=generator
    )  # another batch, too: nothing is left of what was held
    for found, wanted in zip(ours.update(new, -new), fresh.update(new, -new), strict=True):
        assert torch.equal(found, wanted)


def test_only_empty_dynamic_layers_are_exchanged() -> None:
    cache = DynamicCache()
    use_growing_layer(cache, 0)
    use_growing_layer(cache, 2)  # not the next one: left to transformers
    assert [type(layer) for layer in cache.layers] == [GrowingLayer]
    other = DynamicCache()
    other.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    use_growing_layer(other, 0)
    assert type(other.layers[0]) is DynamicLayer
