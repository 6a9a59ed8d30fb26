"""A module in flashinfer's place: checks what it is told as the real one does, and computes
plainly.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


class DecodeWrapper:
    """BatchDecodeWithPagedKVCacheWrapper, as far as it is used: what `run` needs to know lies in
    device buffers.
    """

    made: list[Any]
    wrong: float

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
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any()
        assert kv_layout == "HND"
        assert use_cuda_graph
        assert paged_kv_indptr_buffer is not None
        assert paged_kv_indptr_buffer.shape == (2,)
        assert paged_kv_last_page_len_buffer is not None
        assert paged_kv_indices_buffer is not None
        self.tensor_cores = use_tensor_cores
        self.indptr = paged_kv_indptr_buffer
        self.indices = paged_kv_indices_buffer
        self.last = paged_kv_last_page_len_buffer
        self.plans = 0
        self.made.append(self)

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
        assert indptr.shape == (2,)
        assert indptr[1] == len(indices) <= len(self.indices)
        assert 1 <= int(last_page_len) <= page_size
        self.facts = num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type, kv_data_type
        self.scale = sm_scale
        self.indptr.copy_(indptr)
        self.indices[: len(indices)].copy_(indices)
        self.last.copy_(last_page_len)
        self.plans += 1

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        heads, groups, width, page, *dtypes = self.facts
        assert q.shape == (1, heads, width)
        assert {
            q.dtype,
            *(part.dtype for part in paged_kv_cache),
        } == set(dtypes)
        for part in paged_kv_cache:
            assert part.shape[1:] == (groups, page, width)
            assert part.stride(-1) == 1
        # The table is followed on the device: a graph holds no number of it.
        keys, values = (
            part[self.indices.long()].transpose(0, 1).flatten(1, 2) for part in paged_kv_cache
        )
        held = (self.indptr[1] - self.indptr[0] - 1) * page + self.last
        scores = (
            torch.einsum("gqd,gsd->gqs", q[0].view(groups, -1, width).float(), keys.float())
            * self.scale
        )
        scores = scores.masked_fill(torch.arange(keys.shape[1]) >= held, float("-inf"))
        out = torch.einsum("gqs,gsd->gqd", scores.softmax(-1), values.float()) + self.wrong
        return out.reshape(1, heads, width).to(q.dtype)


class Metadata:
    """MLAPlanMetadata; made by `csr` alone."""

    def __init__(self, *parts: torch.Tensor) -> None:
        assert {part.dtype for part in parts} == {torch.int32}
        self.parts = parts

    @classmethod
    def csr(
        cls,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
    ) -> Metadata:
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)


class LatentWrapper:
    """mla.BatchMLAPagedAttentionWrapper, likewise; `once` plays its backends that may be planned
    but once.
    """

    made: list[Any]
    wrong: float
    once: bool

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any()
        assert use_cuda_graph
        assert backend == "fa2"
        assert qo_indptr is not None
        assert kv_indptr is not None
        assert kv_indices is not None
        assert kv_len_arr is not None
        self.buffers = qo_indptr, kv_indptr, kv_indices, kv_len_arr
        assert {(buffer.dtype, buffer.is_contiguous()) for buffer in self.buffers} == {
            (torch.int32, True)
        }
        self.plans = 0
        self.made.append(self)

    def plan(
        self,
        *,
        metadata: Metadata,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        if head_dim_ckv % 128 or head_dim_kpe % 64:
            raise ValueError(
                "fa2 requires head_dim_ckv to be a multiple of 128 and head_dim_kpe of 64"
            )
        if self.plans and self.once:
            raise RuntimeError(
                "cannot replan because captured metadata pointers must remain stable"
            )
        queries, pages, which, held = metadata.parts
        assert queries.tolist() == [0, 1]
        assert pages.tolist() == [0, len(which)]
        assert (len(which) - 1) * page_size < int(held) <= len(which) * page_size
        assert len(which) <= len(self.buffers[2])
        assert not causal
        for buffer, part in zip(self.buffers, metadata.parts, strict=True):
            buffer[: len(part)].copy_(part)
        self.facts = num_heads, head_dim_ckv, head_dim_kpe, page_size, q_data_type, kv_data_type
        self.scale = sm_scale
        self.plans += 1

    def run(self, *, query: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
        heads, latent, rope, page, *dtypes = self.facts
        assert query.shape == (1, heads, latent + rope)
        assert {query.dtype, kv_cache.dtype} == set(dtypes)
        assert kv_cache.shape[1:] == (page, latent + rope)
        assert kv_cache.stride(-1) == 1
        rows = kv_cache[self.buffers[2].long()].flatten(0, 1).float()
        scores = query[0].float() @ rows.T * self.scale
        scores = scores.masked_fill(torch.arange(len(rows)) >= self.buffers[3], float("-inf"))
        out: torch.Tensor = scores.softmax(-1) @ rows[:, :latent] + self.wrong
        return out[None].to(query.dtype)


def _sampling() -> Any:
    """`sampling`, likewise: probabilities in, probabilities out; `wrong` keeps one token
    too few.
    """
    module = SimpleNamespace(wrong=False, calls=[])

    def keep(probs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        if module.wrong:
            kept = kept & (probs < probs.amax(-1, keepdim=True))
        probs = probs.masked_fill(~kept, 0.0)
        return probs / probs.sum(-1, keepdim=True)

    def check(probs: torch.Tensor) -> None:
        assert probs.dtype == torch.float32
        assert probs.dim() == 2
        assert probs.is_contiguous()
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))

    def top_k_renorm_probs(probs: torch.Tensor, top_k: int) -> torch.Tensor:
        check(probs)
        assert 0 < top_k <= probs.shape[1]
        module.calls.append("top_k")
        return keep(probs, probs >= probs.topk(top_k).values[:, -1:])

    def top_p_renorm_probs(probs: torch.Tensor, top_p: float) -> torch.Tensor:
        """The smallest set of likeliest tokens with that much probability."""
        check(probs)
        assert 0 < top_p < 1
        module.calls.append("top_p")
        ordered = probs.sort(descending=True).values
        last = (ordered.cumsum(-1) < top_p).sum(-1, keepdim=True).clamp_max(probs.shape[1] - 1)
        return keep(probs, probs >= ordered.gather(-1, last))

    module.top_k_renorm_probs, module.top_p_renorm_probs = top_k_renorm_probs, top_p_renorm_probs
    return module


def make() -> Any:
    """A new module; `decode` and `latent` are its wrapper classes, which know what was made and an
    error to add.
    """
    state = {"made": [], "wrong": 0.0}
    decode = type("Decode", (DecodeWrapper,), dict(state))
    latent = type("Latent", (LatentWrapper,), {**state, "made": [], "once": False})
    mla = SimpleNamespace(BatchMLAPagedAttentionWrapper=latent, MLAPlanMetadata=Metadata)
    return SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=decode,
        mla=mla,
        sampling=_sampling(),
        decode=decode,
        latent=latent,
    )
