"""Models without weights, for every loader: built on the meta device, buffers computed anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.config import DTYPES
from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.hosts.transformers.directory import config_of

DEFAULT_DTYPE = torch.bfloat16


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype:
    """A dtype by its name; the default for None.

    Raises:
        ConfigError: another name than those of `config.DTYPES`.
    """
    if dtype is None:
        return DEFAULT_DTYPE
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    found: torch.dtype = getattr(torch, dtype)
    return found


def meta_model(config: Any, dtype: torch.dtype = DEFAULT_DTYPE) -> Any:
    """The causal language model of a transformers config, on the meta device.

    Raises:
        WeightsError: transformers cannot build it from this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            return model.eval()
    except Exception as error:  # transformers raises many kinds
        raise WeightsError(
            f"transformers cannot build a {type(config).__name__} model: {error}"
        ) from error


def meta_model_of(
    values: Mapping[str, Any], dtype: torch.dtype, where: str = "the model's config"
) -> Any:
    """The same from the contents of a config.json; `where` is named in errors.

    Raises:
        WeightsError: transformers knows no such model.
        ConfigError: the config names code or kernels that would have to be run or fetched.
    """
    return meta_model(config_of(values, where), dtype)


def rebuild_buffers(model: Any) -> None:
    """Compute the buffers that no file holds, such as rotary frequencies, on the CPU.

    Raises:
        WeightsError: transformers does not say what is in one.

    Mutates: `model`.
    """
    for module_name, module in model.named_modules():
        missing = _missing_buffers(module)
        if not missing:
            continue
        found = _of_fresh_module(module, missing, model.config)
        if found is None:
            found = _as_initialised(model, module, missing)
        for name in missing:
            if found[name].isnan().any():
                raise WeightsError(
                    f"{module_name}.{name}: no file holds this buffer of {type(module).__name__}, "
                    "and transformers does not say what is in it"
                )
            module._buffers[name] = found[name]


def _of_fresh_module(
    module: nn.Module, names: list[str], config: Any
) -> dict[str, torch.Tensor] | None:
    """Buffers of a new module of the same class; None where a config is not enough to make one."""
    try:
        with torch.device("cpu"):
            fresh: Any = type(module)(config)
    except TypeError:
        return None
    return {name: fresh._buffers[name] for name in names}


def _as_initialised(model: Any, module: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """Buffers as transformers initialises them in a module that it has just made.

    They are NaN where it does not touch them.
    """
    kept = dict(module._buffers)
    try:
        for name in names:
            shape = module._buffers[name].shape  # type: ignore[union-attr]
            module._buffers[name] = torch.full(shape, math.nan, device="cpu")
        for parameter in module.parameters():
            # transformers' own mark, by which it leaves them alone.
            setattr(parameter, "_is_hf_initialized", True)  # noqa: B010
        model._init_weights(module)
        return {name: module._buffers[name] for name in names}  # type: ignore[misc]
    finally:
        module._buffers.update(kept)


def _missing_buffers(module: nn.Module) -> list[str]:
    """Buffers on the meta device that a state dict does not hold."""
    found = []
    for name in module._non_persistent_buffers_set:
        value = module._buffers.get(name)
        if value is not None and value.is_meta:
            found.append(name)
    return found
