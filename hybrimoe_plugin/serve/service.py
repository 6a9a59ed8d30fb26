"""What all handlers of a server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from hybrimoe_plugin.serve.requests import Scheduling


@dataclass(frozen=True)
class Limits:
    """What one client, or all of them, may ask for.

    Attributes:
        body_bytes: of a request's body.
        choices: of one request, `n`.
        logprobs: alternatives that are told with each token.
        stops: stop strings of one request.
        seconds: from the moment a request is queued to the end of its answer; None without limit.
    """

    body_bytes: int = 8 << 20
    choices: int = 16
    logprobs: int = 20
    stops: int = 16
    seconds: float | None = None


@dataclass
class Service:
    """One loaded model and what handlers need to answer for it.

    Attributes:
        model: of transformers, injected or not. Its `generation_config` has the defaults.
        tokenizer: of the model.
        name: the model's, as clients see it.
        created: when the server began, in seconds since 1970.
        language: `serve.text.language.Language`, made when it is first needed.
        store: a `serve.live.places.ExpertStore` of a target on flash; None for other models.
        metrics: a `serve.metrics.Metrics`, which the scheduler tells; None for none.
        closing: whether the server is being shut down: no new requests; endless answers, such as
            live feeds, end.
    """

    model: Any
    tokenizer: Any
    name: str
    scheduler: Scheduling
    limits: Limits = field(default_factory=Limits)
    created: int = field(default_factory=lambda: int(time.time()))
    language: Any = field(default=None, repr=False)
    store: Any = None
    metrics: Any = None
    closing: bool = False
