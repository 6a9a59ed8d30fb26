"""Small engines on an emulated accelerator, and what they must give."""

from __future__ import annotations

from collections.abc import Sequence

import tiny_experts
import torch

from hybrimoe_plugin.compute.backends import Accelerator
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.engine import Engine, SimulatedClock, WallClock
from hybrimoe_plugin.engine.sizing import STAGING_SLOTS, cache_quotas
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.weights.layer_weights import LayerWeights

LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 8, 2, 64
WEIGHTS = [tiny_experts.layer(index=index) for index in range(LAYERS)]


class FixedRouter:
    """Scores and predictions from a fixed random gate."""

    def __init__(
        self, seed: int, experts: int = EXPERTS, hidden: int = HIDDEN, top_k: int = TOP_K
    ) -> None:
        self.gate = torch.randn(experts, hidden, generator=torch.Generator().manual_seed(seed))
        self.top_k = top_k
        self._scores: torch.Tensor | None = None

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._scores = (hidden @ self.gate.T).softmax(-1)
        weights, ids = self._scores.topk(self.top_k)
        return ids, weights

    def scores(self) -> torch.Tensor | None:
        return self._scores

    @property
    def predicts(self) -> bool:
        return True

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ self.gate.T).topk(self.top_k).indices


def build(
    accelerator: Accelerator | str = "emulated",
    weights: Sequence[LayerWeights] = WEIGHTS,
    clock: WallClock | None = None,
    **choices: object,
) -> tuple[Engine, list[FixedRouter]]:
    """An engine over these layers on an accelerator, given or made by name."""
    settings = Settings.of(choices)
    spec = weights[0].spec
    costs = tiny_experts.costs()
    by_name = isinstance(accelerator, str)
    device = make_accelerator(accelerator, torch.device("cpu")) if by_name else accelerator
    quotas = cache_quotas(
        settings, spec.experts, [layer.spec.expert_bytes for layer in weights], None
    )
    scheduler = make_scheduler(settings.scheduler, costs, device is not None)
    controller = Controller(
        SlotPool(quotas, STAGING_SLOTS, shared=settings.budget == "shared"),
        costs,
        scheduler,
        scheduler,
        make_cache(settings.cache, len(weights), spec.experts, spec.top_k, settings),
        make_prefetcher(settings.prefetch, scheduler),
        spec.expert_bytes,
    )
    cpu = TorchExperts(keep=True)
    for layer in weights:
        cpu.add_layer(layer)
    if device is not None:
        device.allocate(controller.pool.slots, weights)
    routers = [
        FixedRouter(index, spec.experts, spec.hidden, spec.top_k) for index in range(len(weights))
    ]
    look_ahead = 0 if settings.prefetch == "off" else settings.look_ahead
    return Engine(
        weights, routers, controller, cpu, device, clock or SimulatedClock(), look_ahead
    ), routers


def plain(
    weights: LayerWeights, hidden: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor
) -> torch.Tensor:
    """Token by token, expert by expert: slow and obviously right."""
    output = torch.zeros_like(hidden)
    for token, (chosen, shares) in enumerate(zip(ids.tolist(), routing.tolist(), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            gate, up, down = weights.dequantized(expert)
            output[token] += share * (
                down @ (torch.nn.functional.silu(gate @ hidden[token]) * (up @ hidden[token]))
            )
    return output


def run(
    engine: Engine,
    routers: Sequence[FixedRouter],
    tokens: int,
    seed: int,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """One pass through all layers, each compared with the plain experts, by `assert_close` defaults
    if not said.
    """
    hidden = torch.randn(
        tokens, engine.layers[0].spec.hidden, generator=torch.Generator().manual_seed(seed)
    )
    for layer, router in enumerate(routers):
        ids, routing = router.route(hidden)
        output = engine.run(layer, hidden, ids, routing)
        torch.testing.assert_close(
            output, plain(engine.layers[layer], hidden, ids, routing), rtol=rtol, atol=atol
        )
        engine.controller.pool.check_integrity()
        hidden = hidden + output
