"""How many replicas there are, and what each takes of its machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.serve.http.layers import Access


@dataclass(frozen=True)
class Scale:
    """How far a model is scaled.

    Attributes:
        replicas: None for one on each GPU, or on each machine where there are no GPUs.
        max_replicas: more than `replicas` lets their number follow the load.
        requests: that a replica is given at once; with so many it is busy, and requests go to
            another.
        queue: requests that may wait for a replica that is free, in each ingress.
        target: requests of a replica, running and waiting, above which one is added and below
            which one is taken away; None for half of `requests`.
        drain_s: how long a replica that is taken away may finish its answers.
        ingresses: processes that take requests.
    """

    replicas: int | None = None
    max_replicas: int | None = None
    requests: int = 16
    queue: int = 256
    target: float | None = None
    drain_s: float = 60.0
    ingresses: int = 1

    def __post_init__(self) -> None:
        for name in ("replicas", "max_replicas", "requests", "queue", "ingresses"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, not {number}")
        for name in ("target", "drain_s"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise ConfigError(f"{name} must be above 0, not {number}")
        if self.replicas and self.max_replicas and self.max_replicas < self.replicas:
            raise ConfigError(
                f"max_replicas ({self.max_replicas}) is below replicas ({self.replicas})"
            )


@dataclass(frozen=True)
class Front:
    """What an ingress lets in.

    Attributes:
        body_bytes: of a request's body.
        wait_s: how long a request waits for a replica that is free.
    """

    access: Access = field(default_factory=Access)
    body_bytes: int = 8 << 20
    wait_s: float = 60.0


class Machine(NamedTuple):
    """What one machine of the cluster has to give."""

    cpus: float
    gpus: float


class Placement(NamedTuple):
    """Attributes:
    replicas, most: at first, and as many as there may be.
    cpus: cores of each; their threads share no core with another replica's.
    gpus: of each, 0 or 1.
    """

    replicas: int
    most: int
    cpus: int
    gpus: int


def place(scale: Scale, machines: Sequence[Machine]) -> Placement:
    """Share the machines out: one GPU each, and the cores in equal parts.

    Raises:
        ConfigError: there are not enough GPUs or cores.
    """
    with_gpus = [machine for machine in machines if machine.gpus >= 1]
    used = with_gpus or [machine for machine in machines if machine.cpus >= 1]
    if not used:
        raise ConfigError("no machine of the cluster has a core or a GPU to give")
    places = sum(int(machine.gpus) for machine in with_gpus) or len(used)
    replicas = scale.replicas or places
    most = max(replicas, scale.max_replicas or 0)
    if with_gpus and replicas > places:
        raise ConfigError(f"{replicas} replicas need as many GPUs, and the cluster has {places}")
    each = ceil(most / len(used))  # on one machine, spread evenly
    shares = [machine.cpus / (int(machine.gpus) or each) for machine in used]
    cpus = int(min(shares))
    if cpus < 1:
        raise ConfigError(f"{each} replicas on one machine have less than a core each")
    return Placement(replicas, most, cpus, 1 if with_gpus else 0)
