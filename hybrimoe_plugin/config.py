"""Validated settings: one frozen dataclass that rules, command line and Python API all fill."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hybrimoe_plugin.errors import ConfigError

SCHEDULERS = ("hybrimoe", "greedy", "ratio", "static", "accelerator_only", "cpu_only")
CACHES = ("adaptive", "mrs", "lru", "lfu", "ema", "static")
PREFETCHERS = ("expected", "impact", "score", "off")
BUDGETS = ("shared", "layer")
CPU_BACKENDS = ("auto", "kt", "ggml", "torch")
DENSE = ("lean", "plain")
LINEARS = ("auto", "quantised", "plain")
WEIGHTS = ("auto", "mapped", "memory")
VERIFY = ("off", "slots")
ATTENTION = ("auto", "torch")
GRAPHS = ("auto", "off")
ACCELERATORS = ("auto", "none", "emulated", "cuda")
KERNELS = ("auto", "triton", "torch")

COLDEST_TEMPERATURE = 1e-4
"""Below it the likeliest token is taken: scores divided by so little are no finite numbers any
more.
"""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*$", re.IGNORECASE)


def parse_bytes(value: int | str, field: str = "size") -> int:
    """Read a byte count such as `1073741824`, `"1GiB"` or `"500 MB"`.

    Raises:
        ConfigError: not a non-negative size.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{field}: expected a size such as 1GiB, found {value!r}")
    if isinstance(value, int):
        if value < 0:
            raise ConfigError(f"{field}: expected a size of at least 0 bytes, found {value}")
        return value
    match = _SIZE.match(value)
    if match is None:
        raise ConfigError(f"{field}: expected a size such as 1GiB or 500MB, found {value!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _help(text: str, **extra: Any) -> dict[str, Any]:
    return {"help": text, **extra}


def setting(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with a help text; `choices`, `low`, `high` in `extra` give the allowed
    range.
    """
    from dataclasses import field

    return field(default=default, metadata=_help(help, **extra))


@dataclass(frozen=True)
class Settings:
    """Everything a user can choose about the engine. Field metadata holds help text and allowed
    range.

    Raises:
        ConfigError: naming field, value and allowed range.
    """

    scheduler: str = setting("hybrimoe", "who computes what in a layer", choices=SCHEDULERS)
    cache: str = setting("adaptive", "which experts stay on the accelerator", choices=CACHES)
    budget: str = setting(
        "shared", "whether layers share the cache or each has an equal part", choices=BUDGETS
    )
    prefetch: str = setting("expected", "what the idle link loads ahead", choices=PREFETCHERS)
    cache_ratio: float | None = setting(
        None, "share of all experts kept on the accelerator", low=0.0, high=1.0
    )
    cache_bytes: int | None = setting(
        None, "accelerator memory for experts, e.g. 4GiB; instead of cache_ratio", low=0
    )
    look_ahead: int = setting(3, "layers that prefetch looks ahead", low=1, high=16)
    mrs_alpha: float = setting(0.5, "weight of the newest scores in MRS", low=0.0, high=1.0)
    mrs_p: int | None = setting(None, "scores per token that MRS keeps; default 2 * top_k", low=1)
    cpu_backend: str = setting("auto", "kernels for experts on the CPU", choices=CPU_BACKENDS)
    cpu_threads: int | None = setting(
        None, "threads for CPU experts; default: measured", low=1, high=1024
    )
    accelerator: str = setting("auto", "device for experts in slots", choices=ACCELERATORS)
    kernels: str = setting(
        "auto", "kernels for experts in slots: fused Triton ones or torch", choices=KERNELS
    )
    context: int = setting(
        4096, "tokens whose attention cache is left free on the accelerator", low=0
    )
    dense: str = setting(
        "lean", "attention, norms and dense MLPs: lean operators or the model's own", choices=DENSE
    )
    linears: str = setting(
        "auto",
        "dense matrices: as the file stores them (auto: on the CPU), or plain",
        choices=LINEARS,
    )
    cuda_graphs: str = setting(
        "auto", "CUDA graphs of the layers for decode on a GPU", choices=GRAPHS
    )
    cpu_graphs: str = setting(
        "auto", "decode on the CPU: two graphs a layer, or module by module", choices=GRAPHS
    )
    attention: str = setting(
        "auto",
        "attention in CUDA graphs: flashinfer where it is faster, or torch",
        choices=ATTENTION,
    )
    weights: str = setting(
        "auto", "the file is mapped, or read into memory on huge pages", choices=WEIGHTS
    )
    verify: str = setting(
        "off", "look for faults: compare cached experts with the file at every call", choices=VERIFY
    )
    profile: str | None = setting(
        None, "machine profile to use instead of the measured one: name or JSON file"
    )

    def __post_init__(self) -> None:
        if isinstance(self.cache_bytes, str):
            object.__setattr__(self, "cache_bytes", parse_bytes(self.cache_bytes, "cache_bytes"))
        for item in fields(self):
            _check(item.name, getattr(self, item.name), str(item.type), item.metadata)
        if self.cache_ratio is not None and self.cache_bytes is not None:
            raise ConfigError("cache_ratio and cache_bytes are both set: give one of them")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Build settings from a mapping (rules' kwargs, parsed flags).

        Raises:
            ConfigError: for an unknown key too, with the known ones.
        """
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**dict(values))


def _check(name: str, value: Any, kind: str, allowed: Mapping[str, Any]) -> None:
    """Check one field against its annotation and its metadata's range."""
    if value is None and "None" in kind:
        return
    if isinstance(value, bool) and not kind.startswith("bool"):
        raise ConfigError(f"{name}: expected {kind}, found {value!r}")
    if kind.startswith("float") and not isinstance(value, int | float):
        raise ConfigError(f"{name}: expected a number, found {value!r}")
    if kind.startswith("int") and not isinstance(value, int):
        raise ConfigError(f"{name}: expected a whole number, found {value!r}")
    if kind.startswith("str") and not isinstance(value, str):
        raise ConfigError(f"{name}: expected text, found {value!r}")
    if "choices" in allowed and value not in allowed["choices"]:
        raise ConfigError(
            f"{name}: expected one of {', '.join(allowed['choices'])}, found {value!r}"
        )
    low, high = allowed.get("low"), allowed.get("high")
    # `not (a <= b)` rather than `a > b`: NaN must fail too.
    if (low is not None and not low <= value) or (high is not None and not value <= high):
        span = f"{low} to {high}" if high is not None else f"at least {low}"
        raise ConfigError(f"{name}: expected {span}, found {value!r}")
