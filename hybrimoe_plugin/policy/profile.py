"""Machine profiles: the costs of one machine and expert shape, as JSON text.

A profile says whether its numbers are measured, emulated, published or assumed.
`hybrimoe_plugin.replay.profile_files` reads profiles from files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hybrimoe_plugin.core import ACTIVATIONS, Activation, ExpertSpec
from hybrimoe_plugin.errors import ProfileError
from hybrimoe_plugin.policy.costs import CostCurve, CostModel

FORMAT = "hybrimoe-profile"
VERSION = 1
BYTES_PER_US = 1e3
"""At 1 GB/s, that is 1e9 bytes a second."""
MAX_THREADS = 4096
MAX_POINTS = 4096
"""Points of a cost curve."""
MAX_NUMBER = 1e12
"""Largest time in microseconds (11 days), bandwidth in GB/s, size or count: beyond it sums and
ratios mean nothing.
"""
LABELS = ("measured", "emulated", "published", "assumed")
_DAMAGE = (KeyError, TypeError, ValueError, OverflowError, AttributeError, ProfileError)
"""What a value of the wrong kind provokes."""


@dataclass(frozen=True)
class Side:
    """One processor."""

    first_us: float
    """Extra time of a layer call's first expert."""
    tokens: tuple[int, ...]
    """Loads that were measured."""
    us: tuple[float, ...]
    """Time of one expert at each of these loads."""
    threads: int | None = None
    """CPU only."""


@dataclass(frozen=True)
class Link:
    """A link's bandwidth in GB/s (1e9 bytes) and latency per transfer."""

    gbps: float
    latency_us: float


@dataclass(frozen=True)
class MachineProfile:
    """What `hybrimoe calibrate` stores.

    `label` says where the numbers come from. An accelerator and its link may be of another label
    than the CPU side; `notes` then says so.
    """

    name: str
    label: str
    created: str
    spec: ExpertSpec
    cpu: Side
    """Calls of one token, and prompts."""
    accelerator: Side | None = None
    link: Link | None = None
    between_layers_us: float = 0.0
    hardware: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cpu_few_rows: Side | None = None
    """Calls of a few rows; None where they were not measured, and `cpu` stands for them too."""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "profile") -> MachineProfile:
        """Parse and validate.

        Raises:
            ProfileError: naming the source and the field at fault.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{source}: not JSON ({error})") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ProfileError(f"{source}: not a machine profile (no format {FORMAT!r})")
        version = data.get("version")
        if version != VERSION:
            raise ProfileError(
                f"{source}: profile version {version!r}, this program reads {VERSION}"
            )
        try:
            return cls._from_dict(data)
        except _DAMAGE as error:
            reason = f"{type(error).__name__}: {error}"
            raise ProfileError(f"{source}: damaged machine profile ({reason})") from None

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> MachineProfile:
        label = data["label"]
        if label not in LABELS:
            raise ValueError(f"label must be one of {', '.join(LABELS)}, found {label!r}")
        accelerator, link = data.get("accelerator"), data.get("link")
        few_rows = data.get("cpu_few_rows")
        if (accelerator is None) != (link is None):
            raise ValueError("accelerator and link must both be given or both be null")
        return cls(
            name=str(data["name"]),
            label=label,
            created=str(data["created"]),
            spec=_spec(data["spec"]),
            cpu=_side(data["cpu"]),
            accelerator=None if accelerator is None else _side(accelerator),
            link=None if link is None else _link(link),
            between_layers_us=_time(data.get("between_layers_us", 0.0)),
            hardware=_texts(data.get("hardware", {})),
            versions=_texts(data.get("versions", {})),
            notes=tuple(map(str, data.get("notes", ()))),
            cpu_few_rows=None if few_rows is None else _side(few_rows),
        )

    def costs(self, spec: ExpertSpec) -> CostModel:
        """Costs for experts of the given shape: exact for the profile's own, else scaled by bytes.

        A decode expert is bound by reading its weights and a transfer by its bytes, so both scale
        with `expert_bytes`; for large loads the true factor lies nearer to the ratio of `hidden *
        intermediate`, which is the same but for the quantisation.
        """
        factor = spec.expert_bytes / self.spec.expert_bytes
        accelerator = self.accelerator or Side(0.0, (1,), (0.0,))
        transfer_us = latency_us = 0.0
        if self.link is not None:
            latency_us = self.link.latency_us
            bytes_per_us = self.link.gbps * BYTES_PER_US
            transfer_us = latency_us + spec.expert_bytes / bytes_per_us

        def with_cpu(cpu: Side, few_rows: CostModel | None = None) -> CostModel:
            return CostModel(
                cpu=CostCurve(cpu.tokens, cpu.us).scaled(factor),
                cpu_first_us=cpu.first_us,
                accelerator=CostCurve(accelerator.tokens, accelerator.us).scaled(factor),
                accelerator_first_us=accelerator.first_us,
                transfer_us=transfer_us,
                link_latency_us=latency_us,
                between_layers_us=self.between_layers_us,
                few_rows=few_rows,
            )

        few_rows = None if self.cpu_few_rows is None else with_cpu(self.cpu_few_rows)
        return with_cpu(self.cpu, few_rows)


def _spec(data: dict[str, Any]) -> ExpertSpec:
    """The experts' shape; all its sizes are sound."""
    spec = ExpertSpec(**{**data, "activation": _activation(data.get("activation", {}))})
    sizes = (spec.hidden, spec.intermediate, spec.experts, spec.top_k, spec.expert_bytes)
    for size in sizes:
        if not _is_whole(size, MAX_NUMBER):
            raise ValueError(
                f"spec sizes must be whole numbers of 1 to {MAX_NUMBER:.0e}, found {sizes}"
            )
    return spec


def _activation(data: dict[str, Any]) -> Activation:
    found = Activation(**data)
    numbers = (found.alpha, found.limit, found.up_shift)
    if found.kind not in ACTIVATIONS or not all(map(_is_finite, numbers)):
        raise ValueError(f"no activation of experts: {str(data)[:80]}")
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _link(data: dict[str, Any]) -> Link:
    return Link(_positive(data["gbps"]), _time(data["latency_us"]))


def _texts(data: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in dict(data).items()}


def _side(data: dict[str, Any]) -> Side:
    """One processor's times; `CostCurve` checks the curve."""
    threads = data.get("threads")
    if threads is not None and not _is_whole(threads, MAX_THREADS):
        raise ValueError(f"threads must be a whole number of 1 to {MAX_THREADS}, found {threads!r}")
    tokens = tuple(data["tokens"])
    if len(tokens) > MAX_POINTS:
        raise ValueError(f"a curve has at most {MAX_POINTS} points, found {len(tokens)}")
    for load in tokens:
        if type(load) is not int or load > MAX_NUMBER:
            raise ValueError(f"tokens must be whole numbers of at most {MAX_NUMBER:.0e}")
    us = [_time(value) for value in data["us"]]
    first_us = _time(data["first_us"])
    curve = CostCurve(tokens, us)
    return Side(first_us, curve.tokens, curve.us, threads)


def _is_whole(value: Any, most: float) -> bool:
    """Whether a value is an integer from 1 to `most`."""
    return type(value) is int and 1 <= value <= most


def _time(value: Any) -> float:
    """Raises: ValueError for anything but a time."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"a time must be a number of 0 to {MAX_NUMBER:.0e}, found {value!r}")
    return float(value)


def _positive(value: Any) -> float:
    """Raises: ValueError for anything but a bandwidth."""
    least = 1 / MAX_NUMBER
    found = _time(value)
    if found < least:
        raise ValueError(f"a bandwidth must be at least {least:.0e}, found {value!r}")
    return found
