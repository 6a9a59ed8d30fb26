"""Which replica Ray hands a request to. Imports Ray."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from hybrimoe_plugin.serve.scaling.affinity import ranked

KEY = "key"
"""Argument of a replica's method that holds the conversation's key, or None."""


class ConversationRouter(RequestRouter):
    """Keeps conversations on their replicas; runs in each process that has a handle of them.

    A replica with `max_ongoing_requests` is busy, and the next in the key's order is asked. Needs
    no memory: all routers give the same order, and so does one that has just been started.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they are tried; of a list of several, the least busy."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # all were tried: wait a moment
        key = pending_request.kwargs.get(KEY)
        if key is None:
            return [candidate_replicas]
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_id[replica]] for replica in ranked(key, by_id)]
