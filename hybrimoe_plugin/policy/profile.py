"""Machine profiles: measured (or published, or assumed) costs of one machine and expert shape, as
JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.errors import ProfileError
from hybrimoe_plugin.files import read_regular
from hybrimoe_plugin.policy.costs import CostCurve, CostModel

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

FORMAT = "hybrimoe-profile"
VERSION = 1
MAX_BYTES = 1 << 20
MAX_POINTS = 4096
"""Points of a cost curve."""
MAX_NUMBER = 1e12
"""Of microseconds (11 days) and GB/s, and of a size or count; beyond it sums and ratios stop
meaning anything.
"""
LABELS = ("measured", "emulated", "published", "assumed")


@dataclass(frozen=True)
class Side:
    """One processor: threads (CPU only), extra time of the first expert, and time of one expert
    over its load.
    """

    first_us: float
    tokens: tuple[int, ...]
    us: tuple[float, ...]
    threads: int | None = None


@dataclass(frozen=True)
class Link:
    """A link's bandwidth in GB/s (1e9 bytes) and latency per transfer."""

    gbps: float
    latency_us: float


@dataclass(frozen=True)
class MachineProfile:
    """What `hybrimoe calibrate` stores. `label` says where the numbers come from; an accelerator
    and its link may be of another label than the CPU side, which `notes` then states.
    """

    name: str
    label: str
    created: str
    spec: ExpertSpec
    cpu: Side
    accelerator: Side | None = None
    link: Link | None = None
    between_layers_us: float = 0.0
    hardware: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
        if data.get("version") != VERSION:
            raise ProfileError(
                f"{source}: profile version {data.get('version')!r}, this program reads {VERSION}"
            )
        try:
            return cls._from_dict(data)
        except (
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
            AttributeError,
            ProfileError,
        ) as error:
            raise ProfileError(
                f"{source}: damaged machine profile ({type(error).__name__}: {error})"
            ) from None

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> MachineProfile:
        label = data["label"]
        if label not in LABELS:
            raise ValueError(f"label must be one of {', '.join(LABELS)}, found {label!r}")
        spec = ExpertSpec(**data["spec"])
        sizes = (spec.hidden, spec.intermediate, spec.experts, spec.top_k, spec.expert_bytes)
        if any(type(size) is not int or not 1 <= size <= MAX_NUMBER for size in sizes):
            raise ValueError(
                f"spec sizes must be whole numbers of 1 to {MAX_NUMBER:.0e}, found {sizes}"
            )
        accelerator, link = data.get("accelerator"), data.get("link")
        if (accelerator is None) != (link is None):
            raise ValueError("accelerator and link must both be given or both be null")
        return cls(
            name=str(data["name"]),
            label=label,
            created=str(data["created"]),
            spec=spec,
            cpu=_side(data["cpu"]),
            accelerator=None if accelerator is None else _side(accelerator),
            link=None if link is None else Link(_positive(link["gbps"]), _time(link["latency_us"])),
            between_layers_us=_time(data.get("between_layers_us", 0.0)),
            hardware={str(k): str(v) for k, v in dict(data.get("hardware", {})).items()},
            versions={str(k): str(v) for k, v in dict(data.get("versions", {})).items()},
            notes=tuple(str(note) for note in data.get("notes", ())),
        )

    def costs(self, spec: ExpertSpec) -> CostModel:
        """Costs for experts of the given shape: exact for the profile's own, else scaled by bytes.

        A decode expert is bound by reading its weights and a transfer by its bytes, so both scale
        with `expert_bytes`; for large loads the true factor lies nearer to the ratio of `hidden *
        intermediate`, which is the same but for the quantisation.
        """
        factor = spec.expert_bytes / self.spec.expert_bytes
        accelerator = self.accelerator or Side(0.0, (1,), (0.0,))
        transfer_us = 0.0
        if self.link is not None:
            transfer_us = self.link.latency_us + spec.expert_bytes / (self.link.gbps * 1e3)
        return CostModel(
            cpu=CostCurve(self.cpu.tokens, self.cpu.us).scaled(factor),
            cpu_first_us=self.cpu.first_us,
            accelerator=CostCurve(accelerator.tokens, accelerator.us).scaled(factor),
            accelerator_first_us=accelerator.first_us,
            transfer_us=transfer_us,
            link_latency_us=self.link.latency_us if self.link is not None else 0.0,
            between_layers_us=self.between_layers_us,
        )


def shipped() -> dict[str, Traversable]:
    """The profiles that come with the package, by name."""
    folder = resources.files("hybrimoe_plugin") / "replay" / "profiles"
    found = {
        item.name.removesuffix(".json"): item
        for item in folder.iterdir()
        if item.name.endswith(".json")
    }
    return dict(sorted(found.items()))


def load_profile(path: str | Path) -> MachineProfile:
    """Read a profile file, or a shipped profile by its name.

    Raises:
        ProfileError: it cannot be read or is damaged.
    """
    source = Path(path)
    known = {} if source.suffix or len(source.parts) > 1 else shipped()
    try:
        packaged = known.get(str(path))
        text = (
            str(read_regular(source, MAX_BYTES), "utf-8")
            if packaged is None
            else packaged.read_text("utf-8")
        )
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = f"; shipped profiles: {', '.join(known)}" if known else ""
        raise ProfileError(f"{path}: cannot read the machine profile ({reason}){hint}") from None
    return MachineProfile.from_json(text, str(path))


def _side(data: dict[str, Any]) -> Side:
    threads = data.get("threads")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_POINTS):
        raise ValueError(f"threads must be a whole number of 1 to {MAX_POINTS}, found {threads!r}")
    tokens = tuple(data["tokens"])
    if len(tokens) > MAX_POINTS:
        raise ValueError(f"a curve has at most {MAX_POINTS} points, found {len(tokens)}")
    if any(type(load) is not int or load > MAX_NUMBER for load in tokens):
        raise ValueError(f"tokens must be whole numbers of at most {MAX_NUMBER:.0e}")
    curve = CostCurve(tokens, [_time(value) for value in data["us"]])
    return Side(_time(data["first_us"]), curve.tokens, curve.us, threads)


def _time(value: object) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= MAX_NUMBER
    ):
        raise ValueError(f"a time must be a number of 0 to {MAX_NUMBER:.0e}, found {value!r}")
    return float(value)


def _positive(value: object) -> float:
    if _time(value) < 1 / MAX_NUMBER:
        raise ValueError(f"a bandwidth must be at least {1 / MAX_NUMBER:.0e}, found {value!r}")
    return float(value)  # type: ignore[arg-type]
