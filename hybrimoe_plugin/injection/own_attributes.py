"""Give a single module attributes that replace those of its class, such as `forward`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_ABSENT = object()


def give_own(module: nn.Module, values: Mapping[str, Any]) -> Callable[[], None]:
    """Set attributes on this module only, not on its class.

    Returns:
        A function that restores the module's own attributes of these names.

    Mutates: `module`.
    """
    own = module.__dict__
    before = {name: own.get(name, _ABSENT) for name in values}
    own.update(values)

    def undo() -> None:
        for name, value in before.items():
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = value

    return undo
