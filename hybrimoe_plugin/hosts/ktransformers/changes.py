"""Changes to other people's modules that can be taken back without a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_OURS = "hybrimoe_plugin.hosts.ktransformers"
_ROOTS = ("ktransformers", f"{_OURS}.operators", f"{_OURS}.blocks")
"""Their modules, and those of ours that are built on them."""
_ABSENT = object()


class Changes:
    """Records what is set in objects and in `sys.modules`, and puts it back in reverse order.

    Modules of ktransformers that were first imported after this object was made hold references to
    what is put in place of missing modules: `undo` forgets them, and what they added to `sys.path`,
    so that an import starts anew.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._imported_before = _theirs()
        self._path_before = list(sys.path)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or class."""
        before = vars(owner).get(name, _ABSENT)

        def undo() -> None:
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)
        setattr(owner, name, value)

    def set_item(self, owner: dict[Any, Any], name: Any, value: Any) -> None:
        """Set an entry of a dictionary."""
        before = owner.get(name, _ABSENT)

        def undo() -> None:
            if before is _ABSENT:
                owner.pop(name, None)
            else:
                owner[name] = before

        self._undo.append(undo)
        owner[name] = value

    def provide(self, name: str, module: ModuleType) -> None:
        """Put a module where an import of `name` finds it."""
        self.set_item(sys.modules, name, module)

    def undo(self) -> None:
        """Take everything back; a second call does nothing."""
        while self._undo:
            undo = self._undo.pop()
            undo()
        for name in _theirs() - self._imported_before:
            _forget(name)
        sys.path[:] = self._path_before


def _theirs() -> set[str]:
    """Names of their modules that are imported."""
    found = set()
    for name in sys.modules:
        if any(f"{name}.".startswith(f"{root}.") for root in _ROOTS):
            found.add(name)
    return found


def _forget(name: str) -> None:
    module = sys.modules.pop(name)
    parent, _, attribute = name.rpartition(".")
    holder = sys.modules.get(parent)
    if holder is None:
        return
    if vars(holder).get(attribute) is module:
        delattr(holder, attribute)
