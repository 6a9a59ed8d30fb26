"""Experts as ggml graphs: against the reference, beside the caller, refusals."""

from __future__ import annotations

import threading

import needs
import pytest
import tiny_experts
import torch

from hybrimoe_plugin.compute.cpu.ggml import TYPES, Ggml, Graph, KernelSpeed
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.cpu.ggml_many_tokens import by_expert, by_index
from hybrimoe_plugin.compute.cpu.ggml_stored import StoredExperts
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.errors import BackendError

needs.kt_kernel()

ALL = list(range(8))


def one_token() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids and weights of a token with two experts."""
    return torch.randn(1, 64), torch.tensor([[1, 5]]), torch.tensor([[0.75, 0.25]])


def compute(
    backend: GgmlExperts | TorchExperts,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    routing: torch.Tensor,
    mine: list[int],
) -> torch.Tensor:
    backend.submit(0, hidden, ids, routing, mine)
    return backend.sync()


@pytest.mark.parametrize("indexed", [frozenset(), frozenset({"Q4_1"}), TYPES])
@pytest.mark.parametrize("types", [("Q8_0",) * 3, ("Q4_0", "Q4_1", "Q5_0"), ("F32",) * 3])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_experts_equal_the_reference(
    types: tuple[str, str, str],
    top_k: int,
    indexed: frozenset[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def speed(_: Ggml, type_name: str, threads: int) -> KernelSpeed:
        return KernelSpeed(type_name in indexed, 1.0)

    monkeypatch.setattr(Ggml, "kernel_speed", speed)
    weights = tiny_experts.layer(types=types, top_k=top_k)
    native = GgmlExperts(2)
    beside = GgmlExperts(1, beside=True)
    plain = TorchExperts(keep=True)
    for backend in (native, beside, plain):
        backend.add_layer(weights)
    limit = 1e-5 if types[0] == "F32" else 0.03
    for tokens in (1, 2, 33, 600):
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.rand(tokens, 8, generator=generator).topk(top_k).indices
        hidden = torch.randn(tokens, 64, generator=generator)
        routing = torch.rand(tokens, top_k, generator=generator)
        for mine in (ALL, [1, 2, 6]):
            wanted = compute(plain, hidden, ids, routing, mine)
            scale = max(1e-3, float(wanted.norm()))
            for backend in (native, beside):
                found = compute(backend, hidden, ids, routing, mine)
                assert float((found - wanted).norm()) / scale < limit
    whole = native.compute(0, hidden, ids, routing)
    torch.testing.assert_close(whole, compute(native, hidden, ids, routing, ALL))
    beside.close()


@pytest.mark.parametrize("tokens", [1, 3, 1024])
def test_tokens_without_an_expert_of_the_cpu_s_give_zeros(tokens: int) -> None:
    """In some pieces of a long prompt nothing may be the CPU's."""
    experts = GgmlExperts(1)
    experts.add_layer(tiny_experts.layer(types=("Q8_0",) * 3))
    hidden = torch.randn(tokens, 64)
    routing = torch.ones(tokens, 2)
    ids = torch.tensor([[0, 1]]).repeat(tokens, 1)
    ids[-1, 0] = 7
    assert not compute(experts, hidden, ids, routing, [5]).any()
    found = compute(experts, hidden, ids, routing, [7])
    assert found[-1].any()
    assert not found[:-1].any()


def test_experts_beside_the_caller_do_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = GgmlExperts(1, beside=True, operations=False)
    experts.add_layer(tiny_experts.layer(types=("Q8_0",) * 3))
    go = threading.Event()
    run = Graph.run
    monkeypatch.setattr(Graph, "run", lambda graph: go.wait(10) and run(graph))
    hidden, ids, routing = one_token()
    experts.submit(0, hidden, ids, routing, [1, 5])
    go.set()  # without a thread of its own `submit` would have waited for this
    torch.testing.assert_close(experts.sync(), experts.compute(0, hidden, ids, routing))
    experts.close()


def test_what_fails_beside_the_caller_is_told_at_the_end_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = GgmlExperts(1, beside=True, operations=False)
    experts.add_layer(tiny_experts.layer(types=("Q8_0",) * 3))
    hidden, ids, routing = one_token()
    with pytest.raises(BackendError):
        experts.submit(0, hidden, ids + 8, routing, [1, 5])

    another = GgmlExperts(1, beside=True, operations=False)
    another.add_layer(tiny_experts.layer(types=("Q8_0",) * 3))

    def fail(_graph: Graph) -> None:
        raise BackendError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(Graph, "run", fail)
        experts.submit(0, hidden, ids, routing, [1, 5])
        with pytest.raises(BackendError, match="broken"):
            experts.sync()
        another.submit(0, hidden, ids, routing, [1, 5])
        another.close()  # nobody waits for the failed call any more
    experts.submit(0, hidden, ids, routing, [1, 5])
    torch.testing.assert_close(experts.sync(), experts.compute(0, hidden, ids, routing))
    experts.close()


@pytest.mark.parametrize("types", [("Q8_0",) * 3, ("Q4_0", "Q4_1", "Q5_0")])
def test_both_ways_through_many_tokens_are_the_same_function(types: tuple[str, str, str]) -> None:
    weights = tiny_experts.layer(types=types, top_k=2)
    stored = StoredExperts.of(Ggml(), 2, weights, repack=False)
    generator = torch.Generator().manual_seed(0)
    # Some of these leave experts without rows.
    for tokens, experts in ((1, 8), (5, 8), (64, 8), (64, 3), (7, 2)):
        ids = torch.rand(tokens, experts, generator=generator).topk(2).indices
        ids += 8 - experts
        hidden = torch.randn(tokens, 64, generator=generator)
        routing = torch.randn(tokens, 2, generator=generator)
        one = by_index(stored, hidden, ids, routing)
        other = by_expert(stored, hidden, ids, routing)
        tolerance = 1e-3 * float(one.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 2, 33, 600])
@pytest.mark.parametrize("mine", [ALL, [1, 2, 6]])
def test_an_expert_that_a_token_names_again_gets_both_weights(tokens: int, mine: list[int]) -> None:
    weights = tiny_experts.layer(types=("F32",) * 3, top_k=3)
    native = GgmlExperts(2)
    plain = TorchExperts(keep=True)
    for backend in (native, plain):
        backend.add_layer(weights)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, 3, (tokens, 3), generator=generator)
    ids[0] = 2
    hidden = torch.randn(tokens, 64, generator=generator)
    routing = torch.rand(tokens, 3, generator=generator)
    found = compute(native, hidden, ids, routing, mine)
    torch.testing.assert_close(found, compute(plain, hidden, ids, routing, mine))


def test_what_the_kernels_must_not_see_is_refused() -> None:
    experts = GgmlExperts(1)
    experts.add_layer(tiny_experts.layer())
    hidden = torch.zeros(2, 64)
    routing = torch.ones(2, 2)
    for ids in (
        torch.full((2, 2), 8),
        torch.full((2, 2), -1),
        torch.zeros(3, 2, dtype=torch.int64),
    ):
        with pytest.raises(BackendError):
            experts.compute(0, hidden, ids, routing)
    with pytest.raises(BackendError):
        experts.compute(0, torch.zeros(2, 32), torch.zeros(2, 2, dtype=torch.int64), routing)
    nine_of_eight = torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(BackendError, match="names 9 of 8 experts"):
        experts.compute(0, hidden, nine_of_eight, torch.ones(2, 9))


def test_a_host_s_default_dtype_does_not_reach_the_buffers() -> None:
    """Graphs read float32 at a pointer.

    Classic kTransformers makes bfloat16 the default while it loads and runs.
    """
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    hidden, ids, routing = one_token()
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            backend = GgmlExperts(1)
            backend.add_layer(weights)
            outputs.append(backend.compute(0, hidden, ids, routing))
        finally:
            torch.set_default_dtype(before)
    torch.testing.assert_close(*outputs)
