"""Replicas and ingress as deployments of Ray Serve. Imports Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.types import ASGIApp

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.http.layers import surround_ingress
from hybrimoe_plugin.serve.requests import QueueFullError
from hybrimoe_plugin.serve.scaling import in_process
from hybrimoe_plugin.serve.scaling.forwarding import Forwarding, ingress
from hybrimoe_plugin.serve.scaling.maker import Maker
from hybrimoe_plugin.serve.scaling.messages import (
    Accepted,
    Answer,
    Call,
    Part,
    Parts,
    ReplicaLostError,
    Start,
)
from hybrimoe_plugin.serve.scaling.placement import Front, Placement, Scale

ROUTER = "hybrimoe_plugin.serve.scaling.router.ConversationRouter"
HEALTH = Call("GET", "/health", b"", ((b"host", b"localhost"),), b"")
ASK_S = 5.0
"""Most that a replica may take to answer for its health or its metrics."""
SPARE = 8
"""Questions for health or metrics that a busy replica answers at once."""
OPEN = 1000
"""Requests that an ingress refuses, or answers for all replicas, while as many wait as may."""
HEALTH_S = 5.0
"""Between two such questions of Ray; after three that failed, the replica is replaced."""
QUIET = {"enable_access_log": False}
"""The application in a replica logs its requests itself."""


class Replica:
    """A server's application with its model, in one process."""

    def __init__(self, maker: Maker, threads: int) -> None:
        self._id: str = serve.get_replica_context().replica_id.unique_id
        self._life = ExitStack()
        self._app = self._life.enter_context(maker.make(threads))

    async def answer(self, call: Call, key: str | None = None) -> AsyncGenerator[Part, None]:
        """Answer one request. The key is for `ConversationRouter`."""
        yield Accepted(self._id)
        parts = in_process.answer(self._app, call)
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()

    async def answer_whole(self, call: Call) -> Answer:
        """Answer one request that is short."""
        start, *body = [part async for part in in_process.answer(self._app, call)]
        assert isinstance(start, Start)
        return Answer(self._id, start, b"".join(piece for piece in body if type(piece) is bytes))

    async def check_health(self) -> None:
        """Called by Ray, which replaces a replica that fails in it again and again."""
        told = await self.answer_whole(HEALTH)
        if told.start.status >= 500:
            raise RuntimeError(f"/health says {told.start.status}: {told.body[:500]!r}")

    def __del__(self) -> None:
        """Called by Ray after the last answer."""
        self._life.close()


class Ingress:
    """Takes requests of clients; any number of them agree on where each belongs."""

    def __init__(self, replicas: Any, front: Front) -> None:
        self._app = ingress(RayReplicas(replicas), Forwarding(wait_s=front.wait_s))
        surround_ingress(self._app, front.body_bytes, front.access)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray after the constructor."""
        return self._app


class RayReplicas:
    """Implements `Replicas` over Ray's handle of a deployment of `Replica`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def send(self, call: Call, key: str | None) -> Parts:
        response = self._handle.options(stream=True).answer.remote(call, key=key)
        try:
            async for part in response:
                yield part
        except (GeneratorExit, asyncio.CancelledError):
            response.cancel()
            raise
        except BackPressureError as error:
            raise QueueFullError("too many requests wait already: try again later") from error
        except DeploymentUnavailableError as error:
            raise ApiError(503, "no replica could be started") from error
        except RayError as error:
            raise ReplicaLostError(f"a replica failed ({type(error).__name__})") from error

    async def ask_all(self, call: Call) -> list[Answer]:
        asked = self._handle.broadcast("answer_whole", call)
        task = asyncio.ensure_future(asked.results_async(return_exceptions=True))
        # Its own time limit does not hold: it waits for what it has cancelled.
        await asyncio.wait({task}, timeout=ASK_S)
        if not task.done():
            task.cancel()
            raise ApiError(503, f"a replica did not answer within {ASK_S:g} s")
        try:
            told = task.result()
        except DeploymentUnavailableError:
            return []
        return [answer for answer in told if isinstance(answer, Answer)]


def application(maker: Maker, front: Front, scale: Scale, placement: Placement) -> Any:
    """What `serve.run` takes."""
    replicas = serve.deployment(Replica).options(
        **_numbers(scale, placement),
        max_ongoing_requests=scale.requests + SPARE,
        max_queued_requests=scale.queue,
        ray_actor_options={"num_cpus": placement.cpus, "num_gpus": placement.gpus},
        request_router_config={
            "request_router_class": ROUTER,
            "request_router_kwargs": {"requests": scale.requests},
            "max_backoff_s": 0.1,
        },
        graceful_shutdown_timeout_s=scale.drain_s,
        health_check_period_s=HEALTH_S,
        max_constructor_retry_count=2,
        logging_config=QUIET,
    )
    entrance = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress",
        num_replicas=scale.ingresses,
        max_ongoing_requests=OPEN + scale.queue + scale.requests * placement.most,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=scale.drain_s,
        logging_config=QUIET,
    )
    return entrance.bind(replicas.bind(maker, placement.cpus), front)


def _numbers(scale: Scale, placement: Placement) -> dict[str, Any]:
    if placement.most == placement.replicas:
        return {"num_replicas": placement.replicas}
    following = {
        "min_replicas": placement.replicas,
        "max_replicas": placement.most,
        "target_ongoing_requests": scale.target or scale.requests / 2,
    }
    return {"autoscaling_config": following}
