"""`hybrimoe serve --ray`: replicas on the GPUs and machines of a Ray cluster."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import add_flag, add_switch, number, whole
from hybrimoe_plugin.config import parse_bytes
from hybrimoe_plugin.errors import ConfigError

REPLICA = "hybrimoe_plugin.cli.serve.command:replica"
PATHS = ("gguf_path", "model_path", "flash_pack", "optimize_config_path", "draft")
_MOST = 1024


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of replicas."""
    add_switch(group, "ray", "serve by replicas on a Ray cluster (docs/scaling.md)")
    add_flag(
        group,
        "ray_address",
        metavar="TEXT",
        help="address of the cluster; default: what RAY_ADDRESS says, else this machine alone",
    )
    add_flag(
        group,
        "replicas",
        type=whole(1, _MOST),
        metavar="N",
        help="processes with a model each; default: one for each GPU, or for each machine where "
        "there are none",
    )
    add_flag(
        group,
        "max_replicas",
        type=whole(1, _MOST),
        metavar="N",
        help="add replicas while many requests wait, up to so many; default: as many as --replicas",
    )
    add_flag(
        group,
        "wait_seconds",
        type=number(0.001, 24 * 3600.0),
        metavar="SECONDS",
        default=60.0,
        help="time that a request waits for a replica that is not busy (default 60)",
    )


def refuse_idle(args: argparse.Namespace) -> None:
    """Refuse flags of replicas where there are none. Raises: ConfigError."""
    for name in ("ray_address", "replicas", "max_replicas"):
        if not args.ray and getattr(args, name) is not None:
            raise ConfigError(f"--{name} has no effect without --ray")


def run(args: argparse.Namespace, access: Any, ready: Callable[[], None]) -> None:
    """Serve until a signal.

    Args:
        access: who may use the server.
        ready: called when all replicas answer.
    """
    from hybrimoe_plugin.serve.scaling import launch

    with launch.Cluster(args.ray_address):
        if not args.quiet:
            notice("loading the model in every replica ...")
        launch.run(lambda: application(args, access), args.host, args.port, ready)


def application(args: argparse.Namespace, access: Any) -> Any:
    """What Ray Serve runs, for the cluster that this process is connected to.

    A replica is given as many requests as it computes at once, and as many again: the next ones
    are there when a place is free, and no more wait where the conversation began than where a
    place will be free first.
    """
    from hybrimoe_plugin.serve.scaling import launch
    from hybrimoe_plugin.serve.scaling.maker import Maker
    from hybrimoe_plugin.serve.scaling.placement import Front, Scale

    scale = Scale(
        replicas=args.replicas,
        max_replicas=args.max_replicas,
        requests=2 * args.max_batch,
        target=args.max_batch,
        queue=args.max_queue,
        drain_s=max(args.shutdown_seconds, 0.1),
    )
    front = Front(access, parse_bytes(args.max_body_bytes), args.wait_seconds)
    return launch.application(Maker(REPLICA, _anywhere(args)), front, scale)


def _anywhere(args: argparse.Namespace) -> argparse.Namespace:
    """The same for processes that run in other folders."""
    found = argparse.Namespace(**vars(args))
    for flag in PATHS:
        path = getattr(args, flag, None)
        if path is not None and os.path.exists(path):
            setattr(found, flag, os.path.abspath(path))
    return found
