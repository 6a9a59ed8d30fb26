"""May the int8 decode kernels take over on this card? They are compared on random experts.

Three things must hold for each stage of each layout, with a pair without a slot among the others:

- the device's instructions for packed integers give the same bits as plain arithmetic;
- on values that int8 holds exactly, as `quantise_activations` makes them, the float kernels give
  the same but for float32's rounding (`ROUNDING`);
- on values as they come, the float kernels give the same within `INT8_ERROR`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from hybrimoe_plugin.compute.gpu.kernels.base import Kernels, SlotCall
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.int8.activations import quantise_activations
from hybrimoe_plugin.compute.gpu.kernels.int8.launch import Int8Decode
from hybrimoe_plugin.compute.gpu.kernels.int8.random_slots import fill_randomly
from hybrimoe_plugin.compute.gpu.kernels.layout import SlotLayout

log = logging.getLogger(__name__)

ROUNDING = 1e-4
"""Largest relative RMS difference that float32 sums in another order make: about 1e-6 are seen."""

INT8_ERROR = 0.05
"""Largest relative RMS error of a stage that rounding to int8 makes.

A group's step is its largest magnitude / 127. For 32 normal values that is about 2.1 / 127 of their
standard deviation, and rounding gives an error of step / sqrt(12) RMS: 0.5 % of the values. A dot
product with independent weights has the same relative error. Gate and up each add theirs; what goes
into down has longer tails and so about twice the step. So 1 % is expected of either stage.
"""

TOKENS = 2


class Disagreement(Exception):
    """The kernels do not compute the same; says what differs."""


def agrees(
    shapes: Iterable[tuple[SlotLayout, int]], buffer: torch.Tensor, plain: Kernels, int8: Int8Decode
) -> bool:
    """As `check`, with what was found in the log; so is every other failure."""
    try:
        check(shapes, buffer, plain, int8)
    except Exception as error:  # what does not compile or launch shows in many ways
        log.warning("activations stay in floating point on %s: %s", buffer.device, error)
        return False
    log.info("int8 activations agree with float ones on %s: they are used", buffer.device)
    return True


def check(
    shapes: Iterable[tuple[SlotLayout, int]], buffer: torch.Tensor, plain: Kernels, int8: Int8Decode
) -> None:
    """Compare the kernels on every layout.

    Args:
        shapes: (layout, top k).
        buffer: [slots, slot bytes] uint8, at least one slot; some are overwritten.
        plain: the float kernels on the buffer's device.
        int8: the kernels that may take over.

    Raises:
        Disagreement: they do not agree.
    """
    for layout, top_k in shapes:
        blocks = int8.blocks(layout, top_k, Blocks.of(layout, top_k))
        call = _random_call(layout, top_k, buffer)
        if int8.takes_gate_up(layout):
            _check_gate_up(call, blocks, plain, int8)
        if int8.takes_down(layout):
            _check_down(call, blocks, plain, int8)


def _check_gate_up(call: SlotCall, blocks: Blocks, plain: Kernels, int8: Int8Decode) -> None:
    layout = call.layout
    present = call.slot_ids.flatten() >= 0

    def by_int8(kernels: Int8Decode, hidden: torch.Tensor) -> torch.Tensor:
        found = hidden.new_zeros(call.slot_ids.numel(), layout.gate.rows)
        kernels.gate_up(call._replace(hidden=hidden), found, blocks)
        return found[present]

    def by_floats(hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = plain.gate_up(call._replace(hidden=hidden))
        return found[present]

    name = f"gate and up of {layout.gate.type_name} and {layout.up.type_name}"
    _compare(name, call.hidden, int8, by_int8, by_floats)


def _check_down(call: SlotCall, blocks: Blocks, plain: Kernels, int8: Int8Decode) -> None:
    layout = call.layout
    size = (call.slot_ids.numel(), layout.down.columns)
    # Products of two, as the activations are.
    activations = _normal(*size, like=call.hidden) * _normal(*size, like=call.hidden)

    def by_int8(kernels: Int8Decode, values: torch.Tensor) -> torch.Tensor:
        found = torch.empty_like(call.hidden)
        kernels.down(call, values, found, blocks)
        return found

    def by_floats(values: torch.Tensor) -> torch.Tensor:
        return plain.down(call, values)

    _compare(f"down of {layout.down.type_name}", activations, int8, by_int8, by_floats)


def _compare(
    name: str,
    values: torch.Tensor,
    int8: Int8Decode,
    by_int8: Callable[[Int8Decode, torch.Tensor], torch.Tensor],
    by_floats: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Compare what one stage makes of values. Raises: Disagreement."""
    found = by_int8(int8, values)
    if not torch.equal(found, by_int8(Int8Decode(asm=False), values)):
        raise Disagreement(f"{name}: not the bits of plain arithmetic")
    held = quantise_activations(values)
    for what, given, limit in (("held in int8", held, ROUNDING), ("rounded", values, INT8_ERROR)):
        error = _rms_error(by_int8(int8, given), by_floats(given))
        if not error <= limit:
            raise Disagreement(
                f"{name}: {error:.1e} off on values {what}, at most {limit} expected"
            )


def _random_call(layout: SlotLayout, top_k: int, buffer: torch.Tensor) -> SlotCall:
    """Two tokens on random experts; one pair has no slot if there are several."""
    used = min(len(buffer), top_k)
    fill_randomly(buffer[:used], layout)
    device = buffer.device
    slot_ids = torch.arange(TOKENS * top_k, device=device).view(TOKENS, top_k) % used
    if slot_ids.numel() > TOKENS:
        slot_ids[1, 0] = -1
    # float32, so that nothing is rounded but to int8.
    hidden = _normal(TOKENS, layout.gate.columns, like=torch.empty(0, device=device))
    weights = torch.rand(TOKENS, top_k, device=device) + 0.1
    return SlotCall(buffer, layout, tuple(range(used)), hidden, slot_ids, weights)


def _normal(*size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(*size, device=like.device)


def _rms_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
