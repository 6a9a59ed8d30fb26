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
    """Lets one thread at a time compute with a model. A turn is one forward pass.

    Operators keep graphs, buffers and cached experts on the model, and the state of a pass while it
    runs. So one pass runs at a time. The state of a sequence is in its own KV cache: between two
    passes of one answer other threads get their turns, and answers that are generated at the same
    time interleave by step. Every model has its own turns, so two models compute at the same time.

    Attributes:
        lock: held by the thread whose turn it is; reentrant.
        before: called at the beginning of each turn; they refuse it by raising.
        clean_up: clear what an interrupted or failed turn has left on the model; called before the
            next one.
        complete: called at the end of each turn, so that its result is right.
    """

    def __init__(self) -> None:
        # Always taken by `with`: no signal can arrive between taking this lock, in C, and the
        # block.
        self.lock = threading.RLock()
        self.before: list[Callable[[], None]] = []
        self.clean_up: list[Callable[[], None]] = []
        self.complete: list[Callable[[], None]] = []
        self._unfinished = False
        self._ended = ""
        self._process = os.getpid()

    def run(self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Call when no other thread computes; at once within a turn.

        Raises:
            BackendError: the model was closed, or loaded by the process that this one was forked
                from.
            HybriMoEError: one of `before` refuses the turn.
        """
        # As `threading.Condition` asks its lock.
        if self.lock._is_owned():  # type: ignore[attr-defined]
            return call(*args, **kwargs)
        with self.lock:
            if self._ended:
                raise BackendError(self._ended)
            if self._process != os.getpid():
                raise BackendError(
                    "this model was loaded before the process was forked, and its threads are not "
                    "here: load it in the process that uses it, or start processes by 'spawn'"
                )
            for part in self.before:
                part()
            if self._unfinished:
                for part in self.clean_up:
                    part()
            self._unfinished = True
            result = call(*args, **kwargs)
            for part in self.complete:
                part()
            self._unfinished = False
            return result

    def end(self, reason: str) -> None:
        """Refuse turns from now on; the caller holds the lock, so none is running.

        Args:
            reason: the message of the error that later turns raise.
        """
        self._ended = reason


def take_turns(model: nn.Module, turns: Turns) -> Callable[[], None]:
    """Make every call of the model, and of any module inside it, wait for its turn.

    Modules are called from outside too: the base model without its head, an embedding, the head.
    Hooks would not do: torch skips them when a call ends with an interrupt.

    Returns:
        A function that restores `forward` of all modules.

    Mutates: `model`.
    """
    restores = []
    for module in model.modules():
        forward = _in_turn(module.forward, turns)
        restores.append(give_own(module, {"forward": forward}))

    def undo() -> None:
        for restore in restores:
            restore()

    return undo


def _in_turn(call: Callable[..., T], turns: Turns) -> Callable[..., T]:
    owned = turns.lock._is_owned  # type: ignore[attr-defined]
    # A turn computes in C, counts, waits and locks: nothing that torch.compile should trace.
    run = torch.compiler.disable(
        turns.run, reason="this model's operators run outside of torch.compile's graphs"
    )

    @functools.wraps(call)  # transformers reads names of arguments off a model's `forward`
    def forward(*args: Any, **kwargs: Any) -> T:
        # Compiling: also where a module inside was compiled by itself.
        if torch.compiler.is_dynamo_compiling() or not owned():
            return run(call, *args, **kwargs)
        return call(*args, **kwargs)

    return forward
