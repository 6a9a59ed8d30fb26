"""The engine's settings as keyword arguments, for type checkers and editors."""

from __future__ import annotations

from typing import Literal, TypedDict


class EngineSettings(TypedDict, total=False):
    """What `load_model` takes beside its own arguments: the fields of `config.Settings`.

    docs/settings.md says what each of them means. A test holds the two classes together.
    """

    scheduler: Literal["hybrimoe", "greedy", "ratio", "static", "accelerator_only", "cpu_only"]
    cache: Literal["adaptive", "mrs", "lru", "lfu", "ema", "static"]
    budget: Literal["shared", "layer"]
    prefetch: Literal["expected", "impact", "score", "off"]
    cache_ratio: float | None
    cache_bytes: int | str | None
    """A number of bytes, or a size such as `4GiB`."""
    look_ahead: int
    mrs_alpha: float
    mrs_p: int | None
    cpu_backend: Literal["auto", "kt", "ggml", "torch"]
    cpu_threads: int | None
    accelerator: Literal["auto", "none", "emulated", "cuda"]
    kernels: Literal["auto", "triton", "torch"]
    activations: Literal["auto", "float", "int8"]
    context: int
    dense: Literal["auto", "quantised", "dequantised", "plain"]
    graphs: Literal["auto", "off"]
    attention: Literal["auto", "torch"]
    host_path: Literal["auto", "wait"]
    weights: Literal["auto", "mapped", "memory"]
    verify: Literal["off", "slots"]
    profile: str | None
    prefill_device: str
    """`cpu`, `cuda`, `cuda:N` or `auto`, in place of what the rules say."""
    generate_device: str
    """The same for calls of one token."""
