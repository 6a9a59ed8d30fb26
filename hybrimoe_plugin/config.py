"""Validated settings: one frozen dataclass that rules, command line and Python API all fill."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields
from typing import Any

from hybrimoe_plugin.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

SCHEDULERS = ("hybrimoe", "greedy", "ratio", "static", "accelerator_only", "cpu_only")
CACHES = ("adaptive", "mrs", "lru", "lfu", "ema", "static")
PREFETCHERS = ("expected", "impact", "score", "off")
BUDGETS = ("shared", "layer")
CPU_BACKENDS = ("auto", "kt", "ggml", "torch")
DENSE = ("auto", "quantised", "dequantised", "plain")
WEIGHTS = ("auto", "mapped", "memory")
VERIFY = ("off", "slots")
ATTENTION = ("auto", "torch")
GRAPHS = ("auto", "off")
HOST_PATHS = ("auto", "wait")
ACCELERATORS = ("auto", "none", "emulated", "cuda")
KERNELS = ("auto", "triton", "torch")
ACTIVATIONS = ("auto", "float", "int8")

# What is chosen beside the engine's settings: for a chat and for the demo model.
SAMPLERS = ("auto", "transformers")
DTYPES = ("float32", "bfloat16", "float16")
DEMO_FORMS = ("mixtral", "qwen2moe")

COLDEST_TEMPERATURE = 1e-4
"""Temperatures below this mean greedy decoding: scores divided by less may not be finite."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"^\s*(\d{1,30}(?:\.\d{1,30})?)\s*([kmg]i?)?b?\s*$", re.IGNORECASE)


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
    unit = _UNITS[(match[2] or "").lower()]
    return int(float(match[1]) * unit)


def setting(default: Any, help: str, **allowed: Any) -> Any:
    """A field of `Settings`: its default, its meaning in one sentence and its allowed values.

    Args:
        default: value of the setting where nobody chooses one.
        help: the sentence that `--help` and docs/settings.md show.
        allowed: `choices`, or `low` and `high`, both included. `expert=True` marks settings
            that belong into rules and Python; they have no documented flag.
    """
    return field(default=default, metadata={"help": help, **allowed})


@dataclass(frozen=True)
class Settings:
    """Everything a user can choose about the engine.

    The metadata of a field holds its `help` and its allowed values: see `setting`.

    Args:
        linears, cuda_graphs, cpu_graphs: accepted for one release; see `OLD_SETTINGS`.

    Raises:
        ConfigError: a value is not allowed, or two settings contradict each other; names the
            setting, the value and the allowed values.
    """

    scheduler: str = setting(
        "hybrimoe", "policy that assigns experts to devices", choices=SCHEDULERS
    )
    cache: str = setting(
        "adaptive", "policy that chooses which experts stay cached", choices=CACHES
    )
    budget: str = setting(
        "shared",
        "whether all layers share the cache or each layer has an equal part of it",
        choices=BUDGETS,
        expert=True,
    )
    prefetch: str = setting(
        "expected", "policy that chooses which experts are loaded ahead", choices=PREFETCHERS
    )
    cache_ratio: float | None = setting(
        None, "share of all experts kept on the accelerator", low=0.0, high=1.0
    )
    cache_bytes: int | None = setting(
        None, "accelerator memory for experts, e.g. 4GiB; instead of cache_ratio", low=0
    )
    look_ahead: int = setting(
        3, "number of layers that prefetching looks ahead", low=1, high=16, expert=True
    )
    mrs_alpha: float = setting(
        0.5, "weight of the newest scores in the cache policy mrs", low=0.0, high=1.0, expert=True
    )
    mrs_p: int | None = setting(
        None,
        "scores per token that the cache policy mrs keeps; default: 2 * top_k",
        low=1,
        expert=True,
    )
    cpu_backend: str = setting(
        "auto",
        "kernels that compute experts on the CPU (auto: the fastest); ggml: its own graphs instead "
        "of compiled operations, for the dense part too",
        choices=CPU_BACKENDS,
    )
    cpu_threads: int | None = setting(
        None, "threads that compute experts; default: measured", low=1, high=1024
    )
    accelerator: str = setting(
        "auto",
        "device that computes cached experts; --device places the other parts too",
        choices=ACCELERATORS,
    )
    kernels: str = setting(
        "auto",
        "kernels that compute cached experts: fused Triton kernels or torch operations",
        choices=KERNELS,
        expert=True,
    )
    activations: str = setting(
        "auto",
        "what cached experts' matrices are multiplied with in decode: floats, int8, or int8 on a "
        "GPU where that proves itself at load (auto)",
        choices=ACTIVATIONS,
        expert=True,
    )
    context: int = setting(4096, "tokens whose KV cache must fit beside the experts", low=0)
    dense: str = setting(
        "auto",
        "everything but the experts: fused operators on quantised or dequantised matrices "
        "(auto: quantised on the CPU only); plain: the model's own modules",
        choices=DENSE,
    )
    graphs: str = setting(
        "auto",
        "decode with graphs of a layer's operations (CUDA graphs on a GPU); off: one by one",
        choices=GRAPHS,
    )
    attention: str = setting(
        "auto",
        "attention in CUDA graphs: the fastest kernel that is right (auto), or torch's",
        choices=ATTENTION,
    )
    host_path: str = setting(
        "auto",
        "CUDA graphs whose experts are all cached: launch the layers behind at once, after a proof "
        "in the first steps (auto), or wait for the host in every layer",
        choices=HOST_PATHS,
        expert=True,
    )
    weights: str = setting(
        "auto",
        "map the weights file, or read it into memory with huge pages",
        choices=WEIGHTS,
    )
    verify: str = setting(
        "off",
        "slots: compare cached experts with the file in every call, to find faults",
        choices=VERIFY,
    )
    profile: str | None = setting(
        None, "machine profile to use instead of the measured one: a name or a JSON file"
    )
    linears: InitVar[str | None] = None
    cuda_graphs: InitVar[str | None] = None
    cpu_graphs: InitVar[str | None] = None

    def __post_init__(
        self, linears: str | None, cuda_graphs: str | None, cpu_graphs: str | None
    ) -> None:
        self._take_old(linears=linears, cuda_graphs=cuda_graphs, cpu_graphs=cpu_graphs)
        if isinstance(self.cache_bytes, str):
            object.__setattr__(self, "cache_bytes", parse_bytes(self.cache_bytes, "cache_bytes"))
        for item in fields(self):
            _check(item.name, getattr(self, item.name), str(item.type), item.metadata)
        if self.cache_ratio is not None and self.cache_bytes is not None:
            raise ConfigError("cache_ratio and cache_bytes are both set: give one of them")

    def _take_old(self, **old: str | None) -> None:
        """Set what the old names ask for."""
        given: dict[str, Any] = {name: value for name, value in old.items() if value is not None}
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                given[item.name] = value
        for name, value in current_settings(given).items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Build settings from a mapping (rules' kwargs, parsed flags).

        Raises:
            ConfigError: for an unknown key too, with the nearest known one or all of them.
        """
        chosen = current_settings(values)
        known = [item.name for item in fields(cls)]
        for name in chosen:
            if name not in known:
                near = did_you_mean(name, known) or f"; known: {', '.join(known)}"
                raise ConfigError(f"unknown setting {name}{near}")
        return cls(**chosen)


@dataclass(frozen=True)
class OldSetting:
    """A setting of an earlier release, accepted for one release more."""

    name: str
    now: str
    """The setting that took its place."""
    values: Mapping[str, str]
    """Each of its values -> the value of the new setting that means the same."""


OLD_SETTINGS = (
    OldSetting(
        "linears",
        "dense",
        {"auto": "auto", "quantised": "quantised", "plain": "dequantised"},
    ),
    OldSetting("cuda_graphs", "graphs", {"auto": "auto", "off": "off"}),
    OldSetting("cpu_graphs", "graphs", {"auto": "auto", "off": "off"}),
)


def current_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under their current names; says once how to write each old one today.

    Raises:
        ConfigError: an old setting has a value that it never had, or contradicts a current one.
    """
    chosen = dict(values)
    asked: dict[str, tuple[str, str]] = {}
    for old in OLD_SETTINGS:
        if old.name not in values:
            continue
        value = chosen.pop(old.name)
        written = f"{old.name}={value}"
        _check(old.name, value, "str", {"choices": tuple(old.values)})
        now = old.values[value]
        _notice_once(f"{written} is now {old.now}={now}: the next release will refuse the old name")
        # auto asks for nothing, so of two old names for one setting the other one counts.
        if old.now not in asked or now != "auto":
            asked[old.now] = now, written
    if chosen.get("dense") == "lean":
        _notice_once("dense=lean is now dense=auto: the next release will refuse the old value")
        chosen["dense"] = asked.pop("dense", ("auto", ""))[0]
    for name, (now, written) in asked.items():
        given = chosen.setdefault(name, now)
        # The model's own modules have no matrices of ours: dense=plain always outdid linears,
        # unless that asked for quantised ones.
        outdone = given == "plain" and now != "quantised"
        if given != now and not outdone:
            raise ConfigError(
                f"{written} and {name}={given} contradict each other: give only {name}"
            )
    return chosen


@functools.cache
def _notice_once(text: str) -> None:
    """A warning, once in a process."""
    log.warning("%s", text)


def _check(name: str, value: Any, kind: str, allowed: Mapping[str, Any]) -> None:
    """Check one value against the annotation of its setting and the allowed values."""
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
    choices = allowed.get("choices")
    if choices is not None and value not in choices:
        near = did_you_mean(value, choices)
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {value!r}{near}")
    low = allowed.get("low")
    high = allowed.get("high")
    # `not (a <= b)` rather than `a > b`: NaN must fail too.
    too_low = low is not None and not low <= value
    too_high = high is not None and not value <= high
    if too_low or too_high:
        span = f"at least {low}" if high is None else f"{low} to {high}"
        raise ConfigError(f"{name}: expected {span}, found {value!r}")
