"""What ingress and replicas say to each other about one HTTP request.

ingress   Call -->  replica
ingress  <--  Accepted, Start, bytes, bytes, ...  replica
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from hybrimoe_plugin.errors import HybriMoEError

Headers = tuple[tuple[bytes, bytes], ...]
"""Names in lower case."""


class ReplicaLostError(HybriMoEError):
    """The process that computed an answer has died."""


@dataclass(frozen=True)
class Call:
    """One HTTP request, whole.

    Attributes:
        query: what follows the question mark, as it was sent.
        client: address and port; None where they are not known.
    """

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    client: tuple[str, int] | None = None


class Accepted(NamedTuple):
    """A replica has begun with a request."""

    replica: str


class Start(NamedTuple):
    """The beginning of an answer; the bytes of its body follow."""

    status: int
    headers: Headers


class Answer(NamedTuple):
    """An answer, whole."""

    replica: str
    start: Start
    body: bytes


Part = Accepted | Start | bytes
Parts = AsyncGenerator[Part, None]


class Replicas(Protocol):
    """All replicas, as the ingress sees them."""

    def send(self, call: Call, key: str | None) -> Parts:
        """Hand a request to the replica that keeps this conversation, or to one that is less busy.

        Waits until one is free. Closed before its end, the answer is cancelled.

        Raises:
            ReplicaLostError: at any point; some parts may have come before.
            QueueFullError: too many wait already.
        """

    async def ask_all(self, call: Call) -> list[Answer]:
        """What every replica that can answer says, however busy it is."""
