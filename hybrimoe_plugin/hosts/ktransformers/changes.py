"""Changes to other people's modules that can be taken back without a trace."""

from __future__ import annotations

import sys
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
        self._set: list[tuple[Any, Any, Any]] = []
        self._modules: list[tuple[str, ModuleType | None]] = []
        self._imported_before = {name for name in sys.modules if _is_theirs(name)}
        self._path_before = list(sys.path)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or class."""
        self._set.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def set_item(self, owner: dict[Any, Any], name: Any, value: Any) -> None:
        """Set an entry of a dictionary."""
        self._set.append((owner, name, owner.get(name, _ABSENT)))
        owner[name] = value

    def provide(self, name: str, module: ModuleType) -> None:
        """Put a module where an import of `name` finds it."""
        self._modules.append((name, sys.modules.get(name)))
        sys.modules[name] = module

    def undo(self) -> None:
        """Take everything back; a second call does nothing."""
        while self._set:
            owner, name, before = self._set.pop()
            if isinstance(owner, dict):
                if before is _ABSENT:
                    owner.pop(name, None)
                else:
                    owner[name] = before
            elif before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        while self._modules:
            name, module = self._modules.pop()
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
        for name in [
            name for name in sys.modules if _is_theirs(name) and name not in self._imported_before
        ]:
            _forget(name)
        sys.path[:] = self._path_before


def _forget(name: str) -> None:
    module = sys.modules.pop(name)
    parent, _, attribute = name.rpartition(".")
    holder = sys.modules.get(parent)
    if holder is not None and vars(holder).get(attribute) is module:
        delattr(holder, attribute)


def _is_theirs(name: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in _ROOTS)
