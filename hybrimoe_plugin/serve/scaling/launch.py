"""Run replicas on a Ray cluster, or on one that is started here. Imports Ray inside functions."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.serve.scaling.maker import Maker
from hybrimoe_plugin.serve.scaling.placement import Front, Machine, Scale, place

NAME = "hybrimoe"
"""Of the application, in Ray's lists."""
LOCAL = "local"
"""Ray's word for a cluster of this machine alone."""
STORE_BYTES = 128 << 20
"""Memory of a local cluster's object store; requests of up to 8 MiB pass through it."""


def application(maker: Maker, front: Front, scale: Scale) -> Any:
    """The application for the cluster that this process is connected to.

    Raises:
        ConfigError: the cluster has not what the replicas need.
    """
    from hybrimoe_plugin.serve.scaling import deployments

    maker.find()
    return deployments.application(maker, front, scale, place(scale, machines()))


def machines() -> list[Machine]:
    """The machines of the cluster; `serve run` asks before it is connected to it."""
    import ray

    if not ray.is_initialized():
        ray.init()
        try:
            return machines()
        finally:
            ray.shutdown()
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Machine(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in found]


def run(
    make: Callable[[], Any], host: str, port: int, ready: Callable[[], None] = lambda: None
) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish the answers. Within `Cluster`.

    Args:
        make: gives the application.
        ready: called when all replicas answer.
    """
    from ray import serve

    signal.signal(signal.SIGTERM, _interrupt)  # Ray's would end this process at once
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(make(), name=NAME)
        ready()
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        serve.delete(NAME)


class Cluster:
    """A connection to a cluster; leaving it stops what was started for it.

    Args:
        address: None for the cluster that `RAY_ADDRESS` names. Without either, one of this machine
            alone is started.

    Raises:
        BackendError: Ray is not installed.
    """

    def __init__(self, address: str | None = None) -> None:
        if find_spec("ray") is None:
            raise BackendError("--ray needs Ray: pip install 'ktransformers-hybrimoe[ray]'")
        self._address = address or os.environ.get("RAY_ADDRESS") or LOCAL

    def __enter__(self) -> Cluster:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # unasked, nothing is sent
        import ray

        if self._address == LOCAL:
            ray.init(address=LOCAL, include_dashboard=False, object_store_memory=STORE_BYTES)
        else:
            ray.init(address=self._address)
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
