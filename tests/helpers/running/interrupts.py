"""Ends a call at any point in our own code, as Ctrl-C does; the same point again for the same
number.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

OURS = ("hybrimoe_plugin", "lever_ext")
_SEEN_AFTER = ("RESUME", "CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD", "SEND")
"""How the operations are called after which the interpreter looks for signals. Between others none
is seen: a lock that `with` has taken is given back, whatever comes.
"""


class _Tracer:
    """Counts the operations of our packages that this thread runs, and raises at one of them.

    Args:
        at: which operation, counted from 1, or the first after it where a signal could be seen;
            None to count only.
    """

    def __init__(self, at: int | None = None, error: BaseException | None = None) -> None:
        self.count = 0
        self.raised = False
        self._at = at
        self._error = error
        self._before_it: dict[FrameType, int] = {}
        """The operation that a frame has last run."""

    def __enter__(self) -> _Tracer:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = str(frame.f_globals.get("__name__"))
        if not name.startswith(OURS):
            return None
        # Not by line: a signal is also seen between a function's return and the assignment of what
        # it gave.
        frame.f_trace_opcodes = True
        return self._operation

    def _operation(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.count += 1
            before = self._before_it.get(frame)
            self._before_it[frame] = frame.f_code.co_code[frame.f_lasti]
            due = self._at is not None and self.count >= self._at and not self.raised
            if due and before is not None and dis.opname[before].startswith(_SEEN_AFTER):
                assert self._error is not None
                self.raised = True
                raise self._error
        elif event == "return":
            self._before_it.pop(frame, None)
        return self._operation


def operations(call: Callable[[], object]) -> int:
    """How many operations of our own a call takes."""
    with _Tracer() as tracer:
        call()
    return tracer.count


def ended(call: Callable[[], object], at: int, error: BaseException) -> bool:
    """Run a call that ends with `error` at its `at`-th operation; gives whether it came that far.

    Whatever else the call raises then is the caller's to see.
    """
    with _Tracer(at, error) as tracer:
        try:
            call()
        except type(error):
            if not tracer.raised:
                raise
    return tracer.raised
