"""A model's first decode steps, made while the user types the first message."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from hybrimoe_plugin.cli.chat.report import on_cpu_alone
from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.compute.cpu.openmp import release_team
from hybrimoe_plugin.hosts.transformers.prefixes.kinds import new_cache, pass_options

log = logging.getLogger(__name__)

_STEPS = 2
"""Graphs of one token are built in the first where they were not at load. In both, ggml's run on
one thread, and layers of compiled operations are computed one by one (`LazyChain`).
"""


def warm_up(model: Any) -> threading.Thread | None:
    """Compute a few tokens in another thread: answers' first tokens then take as long as others.

    A message that is sent meanwhile waits for it: some five steps. Only where the CPU computes
    alone, as nothing there remembers these tokens; otherwise None.
    """
    handle = getattr(model, "hybrimoe", None)
    if handle is None or not on_cpu_alone(handle):
        return None
    thread = threading.Thread(target=_run, args=(model,), name="warm-up", daemon=True)
    thread.start()
    return thread


def _run(model: Any) -> None:
    handle = model.hybrimoe
    try:
        handle.turns.run(_compute, model)  # one turn: no other pass is counted before the reset
    except Exception as error:  # the first answer meets it again, and says it
        log.info("no warm-up: %s", error)
    finally:
        release_team()


@torch.no_grad()
def _compute(model: Any) -> None:
    options = {**pass_options(model), cache_name(model): new_cache(model)}
    ids = torch.zeros(1, 2, dtype=torch.long)
    for _ in range(1 + _STEPS):
        model(ids, **options)
        ids = ids[:, :1]
    model.hybrimoe.reset_stats()
