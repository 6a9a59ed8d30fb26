"""Modules that were not compiled or installed, and what takes their place."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.hosts.ktransformers.changes import Changes
from hybrimoe_plugin.hosts.ktransformers.patches.base import Patch, cannot_import, no_cuda


def _cpuinfer(changes: Changes) -> None:
    from hybrimoe_plugin.hosts.ktransformers.standins import cpuinfer_ext

    for name in ("cpuinfer_ext", "cpuinfer_ext.moe"):
        changes.provide(name, cpuinfer_ext)


def _ops(changes: Changes) -> None:
    from hybrimoe_plugin.hosts.ktransformers.standins import ktransformers_ops

    changes.provide("KTransformersOps", ktransformers_ops)


def _no_flash() -> str | None:
    return cannot_import("flash_attn") or no_cuda()


def _flash(changes: Changes) -> None:
    """Provide the module, and make transformers believe that it and a GPU are there."""
    import transformers.modeling_utils
    import transformers.utils

    from hybrimoe_plugin.hosts.ktransformers.standins import flash_attn

    for name in ("flash_attn", "flash_attn.bert_padding"):
        changes.provide(name, flash_attn)
    for name in ("is_flash_attn_2_available", "is_flash_attn_greater_or_equal_2_10"):
        changes.set(transformers.utils, name, lambda: True)

    def accept(
        cls: Any, config: Any, *_arguments: Any, hard_check_only: bool = False, **_options: Any
    ) -> Any:
        if not hard_check_only:
            config._attn_implementation = "flash_attention_2"
        return config

    changes.set(
        transformers.modeling_utils.PreTrainedModel,
        "_check_and_enable_flash_attn_2",
        classmethod(accept),
    )


def _no_triton() -> str | None:
    return cannot_import("triton") or no_cuda()


def _triton(changes: Changes) -> None:
    from hybrimoe_plugin.hosts.ktransformers.standins import triton_attention

    changes.provide("ktransformers.operators.triton_attention", triton_attention)


PATCHES = (
    Patch(
        "cpuinfer",
        "its CPU kernels (cpuinfer_ext) are compiled at install; kt-kernel's prebuilt ones take "
        "their place, also for its own KExpertsCPU, and threads start at the first task instead of "
        "at import",
        "0.2.1",
        "0.2.2",
        lambda: cannot_import("cpuinfer_ext"),
        _cpuinfer,
    ),
    Patch(
        "ops",
        "its CUDA kernels (KTransformersOps) are compiled at install; torch dequantises GGML "
        "blocks on the device, Marlin linears end in an error that names KLinearTorch",
        "0.2.1",
        "0.2.2",
        lambda: cannot_import("KTransformersOps"),
        _ops,
    ),
    Patch(
        "flash-attn",
        "it imports flash_attn and asks for it by name; torch's scaled dot product attention "
        "answers",
        "0.2.1",
        "0.2.2",
        _no_flash,
        _flash,
    ),
    Patch(
        "triton-attention",
        "its latent attention decodes by a Triton kernel; torch computes the same",
        "0.2.1",
        "0.2.2",
        _no_triton,
        _triton,
    ),
)
