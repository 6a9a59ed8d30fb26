"""Attributes that single modules are given in place of their class's, such as a `forward` that does
more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_ABSENT = object()


def give_own(module: nn.Module, values: Mapping[str, Any]) -> Callable[[], None]:
    """Set attributes of this module alone.

    Returns:
        Puts back what the module had of its own under these names.

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
