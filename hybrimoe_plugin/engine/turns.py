"""Threads that share a model take turns, one forward pass each."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.injection.own_attributes import give_own

T = TypeVar("T")


class Turns:
    """Whose turn it is to compute with a model.

    Operators keep graphs, buffers and cached experts on the model, and what belongs to a pass lies
    there while it runs. So one pass runs at a time. What belongs to a sequence lies in its own KV
    cache: between two passes of an answer others take their turns, and answers that are generated
    at once interleave by step. Every model has turns of its own: two models compute at the same
    time.

    Attributes:
        lock: held by the thread whose turn it is. That thread may take it again.
        before: called at the beginning of each turn; by raising they refuse it.
        recover: clear what an interrupted or failed turn has left on the model; called before the
            next one.
    """

    def __init__(self) -> None:
        # Always taken by `with`: between this lock in C and the block there is no place for a
        # signal.
        self.lock = threading.RLock()
        self.before: list[Callable[[], None]] = []
        self.recover: list[Callable[[], None]] = []
        self._unfinished = False
        self._ended = ""
        self._process = os.getpid()

    def run(self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Call when no other thread computes; within a turn at once.

        Raises:
            BackendError: the model was closed, or loaded by the process that this one was forked
                from.
            HybriMoEError: of what `before` says.
        """
        if self.lock._is_owned():  # type: ignore[attr-defined]  # as `threading.Condition` asks its lock
            return call(*args, **kwargs)
        with self.lock:
            if self._ended:
                raise BackendError(self._ended)
            if self._process != os.getpid():
                raise BackendError(
                    "this model was loaded before the process was forked, and its threads are not "
                    "here: load it in the "
                    "process that uses it, or start processes by 'spawn'"
                )
            for part in self.before:
                part()
            if self._unfinished:
                for part in self.recover:
                    part()
            self._unfinished = True
            result = call(*args, **kwargs)
            self._unfinished = False
            return result

    def end(self, reason: str) -> None:
        """Refuse turns from now on; the caller holds the lock, so none is running. Mutates."""
        self._ended = reason


def take_turns(model: nn.Module, turns: Turns) -> Callable[[], None]:
    """Let every call of the model, and of any module inside it, wait for its turn.

    Modules are called from outside too: the base model without its head, an embedding, the head.
    Hooks would not do: torch leaves them out when a call ends with an interrupt.

    Returns:
        Puts `forward` of all modules back.

    Mutates: `model`.
    """
    undone = [
        give_own(module, {"forward": _in_turn(module.forward, turns)}) for module in model.modules()
    ]

    def undo() -> None:
        for put_back in undone:
            put_back()

    return undo


def _in_turn(call: Callable[..., T], turns: Turns) -> Callable[..., T]:
    owned = turns.lock._is_owned  # type: ignore[attr-defined]
    # What runs in a turn computes in C, counts, waits and locks: torch.compile leaves it as it is.
    run = torch.compiler.disable(
        turns.run, reason="this model's operators run outside of torch.compile's graphs"
    )

    @functools.wraps(call)  # transformers reads names of arguments off a model's `forward`
    def forward(*args: Any, **kwargs: Any) -> T:
        if (
            torch.compiler.is_dynamo_compiling()
        ):  # also where a module inside was compiled by itself
            return run(call, *args, **kwargs)
        return call(*args, **kwargs) if owned() else run(call, *args, **kwargs)

    return forward
