"""How much memory is free, and what of a model fits into it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hybrimoe_plugin.cli.checks.check import Check
from hybrimoe_plugin.errors import WeightsError

_BFLOAT16 = 2
"""Bytes of a dense value as a GPU holds it."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model's parts in bytes."""

    experts: int
    """All routed experts, as stored."""
    count: int
    """Number of routed experts."""
    dense: int
    """Everything else, in bfloat16."""

    @property
    def expert(self) -> float:
        return self.experts / self.count


def host() -> Check:
    import psutil

    from hybrimoe_plugin.device.memory import free_host_bytes, human

    free = human(free_host_bytes())
    total = human(psutil.virtual_memory().total)
    return Check("host", None, f"{free} free of {total}")


def accelerator() -> Check:
    import torch

    from hybrimoe_plugin.device.memory import RESERVE, human

    if not torch.cuda.is_available():
        return Check("accelerator", None, "none")
    free, total = torch.cuda.mem_get_info()
    usable = human(free * (1 - RESERVE))
    return Check(
        "accelerator",
        None,
        f"{human(free)} free of {human(total)}: {usable} for dense weights and cached experts",
    )


def model_on_host(gguf_path: str) -> Check:
    """Whether a model fits into main memory."""
    from hybrimoe_plugin.device.memory import free_host_bytes, human

    sizes = _sizes(gguf_path)
    free = free_host_bytes()
    # Experts stay in the mapped file; if they do not fit, every pass reads them from disk.
    fits = sizes.experts + sizes.dense < free
    return Check(
        "model on host",
        fits,
        f"{human(sizes.experts)} of mapped experts and {human(sizes.dense)} of dense weights, "
        f"{human(free)} free",
    )


def model_on_accelerator(gguf_path: str) -> Check:
    """How many of a model's experts fit on the accelerator."""
    import torch

    from hybrimoe_plugin.device.memory import RESERVE, human
    from hybrimoe_plugin.engine.sizing import STAGING_SLOTS

    name = "model on accelerator"
    sizes = _sizes(gguf_path)
    if not torch.cuda.is_available():
        size = human(sizes.expert)
        return Check(name, None, f"none; experts of {size} each, {sizes.count} in all")
    free, _ = torch.cuda.mem_get_info()
    left = free * (1 - RESERVE) - sizes.dense
    slots = int(left // sizes.expert) - STAGING_SLOTS
    fit = max(0, min(sizes.count, slots))
    share = fit / sizes.count
    return Check(
        name, fit > 0, f"{fit} of {sizes.count} experts beside the dense weights: {share:.0%}"
    )


def _sizes(gguf_path: str) -> Sizes:
    from hybrimoe_plugin.cli.models import EXPERT_TENSOR
    from hybrimoe_plugin.weights.gguf_store import GGUFStore

    store = GGUFStore.open(gguf_path)
    experts = 0
    count = 0
    dense = 0
    for info in store.tensors.values():
        if not EXPERT_TENSOR.match(info.name):
            dense += _BFLOAT16 * prod(info.shape)
            continue
        experts += info.nbytes
        # Each expert has one gate matrix, stacked with those of its layer or by itself.
        if ".ffn_gate" in info.name:
            count += info.shape[0] if len(info.shape) == 3 else 1
    if not count:
        raise WeightsError(f"{gguf_path}: no routed experts in this file")
    return Sizes(experts, count, dense)
