"""Which replica Ray hands a request to. Imports Ray."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from hybrimoe_plugin.serve.scaling.affinity import ranked

KEY = "key"
"""Argument of a replica's method that holds the conversation's key, or None."""


class ConversationRouter(RequestRouter):
    """Keeps conversations on their replicas; runs in each process that has a handle of them.

    Where a replica is busy, the next in the key's order is asked. Needs no memory: all routers give
    the same order, and so does one that has just been started.
    """

    def initialize_state(self, requests: int) -> None:
        """Called by Ray. A replica with so many requests is busy.

        Ray's own limit, `max_ongoing_requests`, would count questions for health as well.
        """
        self._requests = requests
        self._running: dict[Any, set[str]] = {}
        """Replica -> requests from here that it has accepted."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they are tried; of a list of several, the least busy."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # all were tried: wait a moment
        free = [replica for replica in candidate_replicas if not self._is_busy(replica)]
        key = pending_request.kwargs.get(KEY)
        if key is None:
            return [free]
        by_id = {replica.replica_id.unique_id: replica for replica in free}
        return [[by_id[replica]] for replica in ranked(key, by_id)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Called by Ray when a replica has accepted a request."""
        here = self._running.setdefault(replica_id, set())
        here.add(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray when a request has ended, in whatever way."""
        here = self._running.get(replica_id, set())
        here.discard(internal_request_id)
        if not here:
            self._running.pop(replica_id, None)

    def _is_busy(self, replica: RunningReplica) -> bool:
        """By what is known, which may be too little: the replica itself has the last word.

        Ray's number counts requests from everywhere, from the moment they are sent, but is
        forgotten 10 s after the last of them.
        """
        told = self.replica_queue_len_cache.get(replica.replica_id) or 0
        here = len(self._running.get(replica.replica_id, ()))
        return max(told, here) >= self._requests
