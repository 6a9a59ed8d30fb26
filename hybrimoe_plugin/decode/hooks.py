"""Whether somebody watches modules whose calls are left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn


class Hooks:
    """The hooks of some modules, and how many of them are known: a gate has the one of its
    router.
    """

    def __init__(
        self, modules: Iterable[nn.Module] = (), gates: Collection[nn.Module] = ()
    ) -> None:
        modules = list(modules)
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._known = [count for module in modules for count in (int(module in gates), 0)]

    def foreign(self) -> bool:
        """Whether there are others."""
        return list(map(len, self._hooks)) != self._known
