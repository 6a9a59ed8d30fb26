"""Machines without CUDA: what calls or names it regardless."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_plugin.hosts.ktransformers.changes import Changes
from hybrimoe_plugin.hosts.ktransformers.patches.base import Patch, no_cuda

_MARLIN = {"KLinearMarlin": "KLinearTorch", "KExpertsMarlin": "KExpertsCPU"}
_MARLIN_UTILS = (
    "ktransformers.ktransformers_ext.operators.custom_marlin.quantize.utils.marlin_utils"
)
_CALLERS = (
    "ktransformers.util.utils",
    "ktransformers.operators.experts",
    "ktransformers.operators.linear",
)
"""Modules that call `torch.cuda` or pin memory without asking."""


def _import_without_cuda(changes: Changes) -> None:
    """Import the one module that asks for the GPU's capability on import; nothing stays changed."""
    del changes
    asked = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: (0, 0)
    try:
        importlib.import_module(_MARLIN_UTILS)
    finally:
        torch.cuda.get_device_capability = asked


class _QuietCuda:
    """`torch.cuda` where there is none: streams and waits are nothing to do."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def is_current_stream_capturing(self) -> bool:
        return False

    def current_stream(self, device: Any = None) -> types.SimpleNamespace:
        return types.SimpleNamespace(cuda_stream=0)


class _TorchWithoutCuda:
    """`torch` for a module without CUDA: its `cuda` does nothing and no memory is pinned."""

    cuda = _QuietCuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **options)


def _cuda_calls(changes: Changes) -> None:
    view = _TorchWithoutCuda()
    for name in _CALLERS:
        changes.set(importlib.import_module(name), "torch", view)
    changes.set(torch.Tensor, "cuda", lambda self, *_arguments, **_options: self)


def _cuda_devices(changes: Changes) -> None:
    """Read `cuda` as `cpu` in rules and defaults, and Marlin linears as torch's."""
    optimize: Any = importlib.import_module("ktransformers.optimize.optimize")
    utils: Any = importlib.import_module("ktransformers.util.utils")
    decide: Callable[..., None] = optimize.gen_optimize_config

    @functools.wraps(decide)
    def gen_optimize_config(
        module: Any, out_data: Any, rule_list: Any, prefix: str = "", default_device: str = "cpu"
    ) -> None:
        if not prefix:
            rule_list = on_cpu(rule_list)
        # The function calls itself by its module's name, that is this one, for every child.
        decide(module, out_data, rule_list, prefix, "cpu")

    found: Callable[..., str] = utils.get_device
    changes.set(optimize, "gen_optimize_config", gen_optimize_config)
    changes.set(
        utils,
        "get_device",
        functools.wraps(found)(lambda key, device_map: on_cpu(found(key, device_map))),
    )


def on_cpu(value: Any) -> Any:
    """Rules, or a part of them, with CUDA devices and kernels replaced, as a copy.

    Left alone are experts on the emulated accelerator, whose device is one on paper.
    """
    if isinstance(value, dict):
        if value.get("accelerator") == "emulated":
            return value
        return {key: on_cpu(item) for key, item in value.items() if key != "transfer_map"}
    if isinstance(value, list):
        return [on_cpu(item) for item in value]
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return _MARLIN.get(value, value) if isinstance(value, str) else value


PATCHES = (
    Patch(
        "cuda-at-import",
        "its Marlin utilities ask for the GPU's capability while they are imported; without a GPU "
        "that is an error",
        "0.2.1",
        "0.2.2",
        no_cuda,
        _import_without_cuda,
    ),
    Patch(
        "cuda-calls",
        "local_chat, prefill_and_generate and the experts call torch.cuda and pin memory whatever "
        "the device is; without a GPU these calls do nothing",
        "0.2.1",
        "0.2.2",
        no_cuda,
        _cuda_calls,
    ),
    Patch(
        "cuda-devices",
        "its rules name cuda, and so do its defaults for modules that no rule lists; without a GPU "
        "they mean cpu, and KLinearMarlin means KLinearTorch",
        "0.2.1",
        "0.2.2",
        no_cuda,
        _cuda_devices,
    ),
)
