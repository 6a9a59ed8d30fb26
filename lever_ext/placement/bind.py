"""Connects the experts operators of a target to its expert cache and routers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrimoe_plugin.errors import FlashError
from hybrimoe_plugin.injection.inject import Injection
from hybrimoe_plugin.operators.routers import GateRouter, router_beside
from lever_ext.flash.experts import FlashExpertCache
from lever_ext.flash.pack import FlashPack
from lever_ext.operators.experts import FlashExperts
from lever_ext.placement.choose import Placement
from lever_ext.placement.device import TargetDevice


def bind_experts(
    injection: Injection,
    experts: FlashExpertCache | None,
    model: Any,
    placement: Placement,
    accelerator: TargetDevice | None,
    pack: FlashPack,
) -> None:
    """Give every experts operator the cache, its layer's router and the next layer's.

    The next layer's router is given where its weights are resident.

    Args:
        injection: what was injected into the model.
        experts: None for a dense target.
        model: the target.
        placement: of its layers.
        accelerator: computes a part of it; None for the CPU alone.
        pack: of its weights.

    Raises:
        FlashError: the model has routed experts and the pack has none.

    Mutates: the operators.
    """
    operators = [
        done.operator for done in injection.replaced if isinstance(done.operator, FlashExperts)
    ]
    if not operators:
        return
    if experts is None:
        raise FlashError(
            f"{pack.path}: the pack holds no routed experts; it was made from another model"
        )
    routers = _routers(model, operators)
    device = placement.experts_on(accelerator)
    for operator, router, following in zip(
        operators, routers, _following(operators, routers, placement), strict=True
    ):
        operator.bind(experts, router, following, device)
    if device is not None and accelerator is not None and accelerator.pins is not None:
        accelerator.pins.add(experts.buffers)


def _routers(model: Any, operators: Sequence[FlashExperts]) -> list[GateRouter | None]:
    """The router of each operator's layer."""
    found: list[GateRouter | None] = []
    for operator in operators:
        layer = model.get_submodule(operator.key.rpartition(".")[0])
        gate = router_beside(layer)
        found.append(None if gate is None else GateRouter(gate, operator.form.experts))
    return found


def _following(
    operators: Sequence[FlashExperts],
    routers: Sequence[GateRouter | None],
    placement: Placement,
) -> list[GateRouter | None]:
    """For each operator the router of the next MoE layer; None where it is not resident."""
    found: list[GateRouter | None] = []
    for operator, router in zip(operators[1:], routers[1:], strict=True):
        resident = placement.keeps_router(operator.layer_index)
        found.append(router if resident else None)
    return [*found, None]
