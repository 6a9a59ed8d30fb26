"""The command without a model: what it loads is given by a test, and few endpoints answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hybrimoe_plugin.cli.serve import command
from hybrimoe_plugin.hosts import transformers as host
from hybrimoe_plugin.serve import routers
from hybrimoe_plugin.serve.api import models, status


def put_in_place(patch: pytest.MonkeyPatch, load_model: Callable[..., Any]) -> None:
    """Let `hybrimoe serve` load what `load_model` gives, a model that nobody asks anything."""
    patch.setattr(host, "load_model", load_model)
    patch.setattr(command, "_prepare_grammars", lambda _tokenizer: None)
    patch.setattr(
        routers, "all_routers", lambda service: [models.router(service), status.router(service)]
    )
