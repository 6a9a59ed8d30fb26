"""A CUDA graph's stand-in on the CPU: records every operation below Python, and every launch of an
interpreted Triton kernel, and does it again on the same memory.

What a real graph freezes is frozen: numbers, shapes, control flow, which tensors are read and
written. What a real capture forbids is an error: reading a value on the host, sizes that depend on
values, other devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = ("_local_scalar_dense", "nonzero", "_unique", "masked_select", "is_nonzero", "equal")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, list[tuple[int, torch.Tensor]]]] = []
        self._launching = False
        self._launches = _patched_launches(self)

    def __enter__(self) -> Any:
        self._launches.start()
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._launches.stop()

    def launch(self, run: Any, args: Any, kwargs: Any) -> None:
        """Record a Triton kernel and run it; what its interpreter does with tensors is no part."""
        self._launching = True
        try:
            run(*args, **kwargs)
        finally:
            self._launching = False
        self.done.append((run, args, kwargs, []))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._launching:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name.startswith(FORBIDDEN):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **kwargs)
        given = {
            _memory(value)
            for value in tree_leaves((args, kwargs))
            if isinstance(value, torch.Tensor)
        }
        # Views and in-place results are memory that was there; what is new keeps its place.
        made = [
            (index, value)
            for index, value in enumerate(tree_leaves(result))
            if isinstance(value, torch.Tensor) and _memory(value) not in given
        ]
        self.done.append((func, args, kwargs, made))
        return result


def _patched_launches(recorder: _Recorder) -> Any:
    """A patch under which launches of interpreted kernels go to the recorder."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return mock.patch.dict({})
    interpret = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        recorder.launch(partial(interpret, executor), args, kwargs)

    return mock.patch.object(GridExecutor, "__call__", launch)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Replayed:
    """A `Capture`; counts what is asked of it.

    Args:
        spoil: called with each piece's number, its recorded operations and its replay; gives the
            replay to use.
    """

    def __init__(
        self, spoil: Callable[[int, Any, Callable[[], None]], Callable[[], None]] | None = None
    ) -> None:
        self._spoil = spoil
        self._mode: _Recorder | None = None
        self._aside = False
        self.captured = 0
        self.replayed = 0
        self.abandoned = 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._aside = True
        try:
            yield
        finally:
            assert self._mode is None, "a capture was left open"
            self._aside = False

    def begin(self) -> None:
        assert self._aside
        assert self._mode is None
        self._mode = _Recorder()
        self._mode.__enter__()

    def end(self) -> Callable[[], None]:
        assert self._mode is not None
        mode, self._mode = self._mode, None
        mode.__exit__(None, None, None)
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, made in mode.done:
                again = tree_leaves(func(*args, **kwargs))
                for index, old in made:
                    old.copy_(again[index])

        return replay if self._spoil is None else self._spoil(self.captured, mode.done, replay)

    def time_us(self, replay: Callable[[], None]) -> float:
        started = time.perf_counter_ns()
        replay()
        return (time.perf_counter_ns() - started) / 1e3

    def abandon(self) -> None:
        self.abandoned += 1
        if self._mode is not None:
            mode, self._mode = self._mode, None
            mode.__exit__(None, None, None)
