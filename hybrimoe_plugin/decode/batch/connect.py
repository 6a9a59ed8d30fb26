"""A decoder layer's graphs, for steps of one sequence and of several."""

from __future__ import annotations

import logging
from collections.abc import Sized

import torch
from torch import nn

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.decode.batch.batch_layer import BatchLayer
from hybrimoe_plugin.decode.batch.batch_state import BatchState
from hybrimoe_plugin.decode.batch.steady_batches import SteadyBatches
from hybrimoe_plugin.decode.chain.link import link_of
from hybrimoe_plugin.decode.cuda_layer import CudaLayer
from hybrimoe_plugin.decode.decode_state import DecodeState
from hybrimoe_plugin.decode.foreign_hooks import ForeignHooks
from hybrimoe_plugin.decode.layer_call import EagerLayer
from hybrimoe_plugin.device.cuda_graphs import Capture
from hybrimoe_plugin.operators.attention import AttentionOperator
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.routers import GateRouter

log = logging.getLogger(__name__)


class States:
    """What the captured layers of one device share.

    Attributes:
        one: in steps of one sequence.
    """

    def __init__(self, capture: Capture, device: torch.device) -> None:
        self.one = DecodeState(capture, device)
        self._several: BatchState | None = None
        """That of the number of sequences that was asked for last."""

    def of(self, batch: int) -> BatchState:
        """In steps of several sequences. Mutates: that of another number is not kept here."""
        known = self._several
        if known is None or known.batch != batch:
            self._several = known = BatchState(self.one.capture, self.one.device, batch)
        return known


def cuda_layer(
    key: str, eager: EagerLayer, output_hooks: Sized, states: States, settings: Settings
) -> CudaLayer | None:
    """A decoder layer's graphs; None if its attention or router cannot be captured.

    Args: as for `CudaLayer`.

    Mutates: `states`, of which the one for single sequences counts its layers.
    """
    inside = [module for module in eager.module.modules() if module is not eager.module]
    experts = [module for module in inside if isinstance(module, HybriMoEExperts)]
    attention = _dense_attention(eager.module)
    if attention is None or len(experts) > 1 or not all(map(_can_be_captured, experts)):
        log.info(
            "%s: not captured: needs fused attention, a transformers router and an accelerator",
            key,
        )
        return None
    states.one.layers += 1
    parts = (
        key,
        eager,
        attention,
        experts[0] if experts else None,
        _hooks_around(experts, inside),
        output_hooks,
    )
    link = link_of(experts[0], states.one, settings) if experts else None
    made = CudaLayer(*parts, states.one, settings, link)
    made.others = SteadyBatches(eager, lambda batch: BatchLayer(*parts, states.of(batch), settings))
    return made


def _dense_attention(layer: nn.Module) -> AttentionOperator | None:
    """The layer's attention, if it runs on the device."""
    fused = [part for part in layer.modules() if isinstance(part, AttentionOperator)]
    return fused[0] if len(fused) == 1 and fused[0].ggml is None else None


def _can_be_captured(experts: HybriMoEExperts) -> bool:
    router, _ = experts.routers()
    return experts.accelerator is not None and isinstance(router, GateRouter)


def _hooks_around(experts: list[HybriMoEExperts], inside: list[nn.Module]) -> ForeignHooks:
    """The hooks of a layer's modules but its experts."""
    apart = {module for operator in experts for module in operator.modules()}
    gates = []
    for operator in experts:
        router, _ = operator.routers()
        assert isinstance(router, GateRouter)
        gates.append(router.gate)
    return ForeignHooks((module for module in inside if module not in apart), gates)
