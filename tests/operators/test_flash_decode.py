"""flashinfer's attention in graphs, with a module in its place that checks what it is told and computes plainly."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from replayed import Replayed

from hybrimoe_plugin import load_model
from hybrimoe_plugin.operators import flash_decode, graphs
from hybrimoe_plugin.operators.flash_decode import PAGE, FlashDecode, Shape

SHAPE = Shape(heads=8, groups=2, width=16, room=64, dtype=torch.bfloat16, scaling=0.25)
CPU = torch.device("cpu")


class Wrapper:
    """BatchDecodeWithPagedKVCacheWrapper, as far as it is used: what `run` needs to know lies in device buffers."""

    made: list[Wrapper]
    wrong = 0.0

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and not float_workspace_buffer.any()
        assert kv_layout == "HND" and use_cuda_graph
        assert paged_kv_indptr_buffer is not None and paged_kv_indptr_buffer.shape == (2,)
        assert paged_kv_last_page_len_buffer is not None and paged_kv_indices_buffer is not None
        self.tensor_cores = use_tensor_cores
        self.indptr, self.indices = paged_kv_indptr_buffer, paged_kv_indices_buffer
        self.last = paged_kv_last_page_len_buffer
        self.plans = 0
        type(self).made.append(self)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        assert {tensor.dtype for tensor in (indptr, indices, last_page_len)} == {torch.int32}
        assert indptr.shape == (2,) and indptr[1] == len(indices) <= len(self.indices)
        assert 1 <= int(last_page_len) <= page_size
        self.facts = num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type, kv_data_type
        self.scale = sm_scale
        self.indptr.copy_(indptr)
        self.indices[: len(indices)].copy_(indices)
        self.last.copy_(last_page_len)
        self.plans += 1

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        heads, groups, width, page, *dtypes = self.facts
        assert q.shape == (1, heads, width) and {q.dtype, *(part.dtype for part in paged_kv_cache)} == set(dtypes)
        for part in paged_kv_cache:
            assert part.shape[1:] == (groups, page, width) and part.stride(-1) == 1
        # The table is followed on the device: a graph holds no number of it.
        keys, values = (part[self.indices.long()].transpose(0, 1).flatten(1, 2) for part in paged_kv_cache)
        held = (self.indptr[1] - self.indptr[0] - 1) * page + self.last
        scores = torch.einsum("gqd,gsd->gqs", q[0].view(groups, -1, width).float(), keys.float()) * self.scale
        scores = scores.masked_fill(torch.arange(keys.shape[1]) >= held, float("-inf"))
        out = torch.einsum("gqs,gsd->gqd", scores.softmax(-1), values.float()) + type(self).wrong
        return out.reshape(1, heads, width).to(q.dtype)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> type[Wrapper]:
    Wrapper.made, Wrapper.wrong = [], 0.0
    monkeypatch.setattr(flash_decode, "WORKSPACE_BYTES", 1 << 10)
    monkeypatch.setattr(flash_decode, "installed", lambda: True)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper))
    return Wrapper


class Timed(Replayed):
    """Times are as given, in the order in which they are asked for: torch's, flashinfer's."""

    def __init__(self, *times: float) -> None:
        super().__init__()
        self.times = list(times)

    def time_us(self, replay: Callable[[], None]) -> float:
        replay()
        return self.times.pop(0)


def test_the_faster_one_is_chosen(flashinfer: type[Wrapper]) -> None:
    assert isinstance(flash_decode.choose(SHAPE, CPU, Timed(2.0, 1.0)), FlashDecode)
    assert flash_decode.choose(SHAPE, CPU, Timed(1.0, 2.0)) is None
    assert [made.tensor_cores for made in flashinfer.made] == [True, True], "four heads share a key head"
    for other in (SHAPE._replace(dtype=torch.float32), SHAPE._replace(room=PAGE * 3 + 1)):
        assert flash_decode.choose(other, CPU, Timed()) is None, "not tried"
    assert len(flashinfer.made) == 2


def test_what_is_wrong_or_fails_is_not_used(
    flashinfer: type[Wrapper], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashinfer.wrong = 0.5
    assert flash_decode.choose(SHAPE, CPU, Timed(2.0, 1.0)) is None
    assert "differs from torch's attention" in caplog.text
    monkeypatch.setattr(Wrapper, "run", lambda *_: 1 / 0)
    capture = Timed(2.0, 1.0)
    assert flash_decode.choose(SHAPE, CPU, capture) is None
    assert "division by zero" in caplog.text
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert flash_decode.choose(SHAPE, CPU, Timed()) is None


@pytest.mark.parametrize("held", [0, 1, PAGE - 1, PAGE, 63])
def test_pages_are_the_cache_by_its_strides(held: int, flashinfer: type[Wrapper]) -> None:
    kernel = FlashDecode(sys.modules["flashinfer"], SHAPE, CPU)
    query = torch.randn(1, 8, 1, 16, dtype=SHAPE.dtype)
    keys, values = torch.randn(2, 1, 2, 64, 16, dtype=SHAPE.dtype)
    assert kernel._pages(keys).data_ptr() == keys.data_ptr()
    kernel.plan(held)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, keys[:, :, : held + 1], values[:, :, : held + 1], scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(kernel(query, keys, values), wanted, rtol=0.02, atol=0.02)


def decode(model: Any, steps: int = 40) -> list[float]:
    """Logits of a prompt's answer, teacher-forced."""
    with torch.no_grad():
        out = model(tiny.tokens(7), use_cache=True)
        logits = []
        for token in tiny.tokens(steps, seed=1)[0]:
            out = model(token[None, None], cache=out.cache, use_cache=True)
            logits.append(out.logits[0, -1].float())
    return torch.stack(logits).flatten().tolist()


@pytest.mark.parametrize("breaks", [False, True])
def test_a_model_decodes_with_it(
    breaks: bool,
    flashinfer: type[Wrapper],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In graphs, through growth; one that goes wrong after it was chosen is left and the layers are captured anew."""
    monkeypatch.setattr(graphs, "ROOM", 16)
    path = tiny.write(tmp_path, "qwen3_moe")
    choices = {"accelerator": "emulated", "linears": "plain", "cpu_backend": "torch", "dtype": "bfloat16"}
    answers, captures = [], []
    for attention in ("auto", "torch"):
        captures.append(Timed(*[2.0, 1.0] * 3))
        monkeypatch.setattr(graphs, "capture_for", lambda device: captures[-1])
        model, _ = load_model(None, path, progress=False, attention=attention, **choices)
        if breaks and attention == "auto":
            compare = flash_decode.compare

            def spoiled(*given: Any, compare: Any = compare) -> tuple[float, float]:
                times: tuple[float, float] = compare(*given)
                Wrapper.wrong = 0.5
                return times

            monkeypatch.setattr(flash_decode, "compare", spoiled)
        answers.append(torch.tensor(decode(model)))
        assert all(module.captured for module in model.modules() if isinstance(module, graphs.GraphedLayer))
        model.hybrimoe.close()
    assert (answers[0] - answers[1]).norm() / answers[1].norm() < 0.05
    if breaks:
        assert "flashinfer is not used on cpu any more" in caplog.text
        assert "CUDA graphs are not used" not in caplog.text
    else:
        assert not caplog.records or caplog.records[-1].levelno < logging.WARNING
        assert len(flashinfer.made) == 3, "rooms of 16, 32 and 64 tokens"
        assert sum(made.plans for made in flashinfer.made) > 40
