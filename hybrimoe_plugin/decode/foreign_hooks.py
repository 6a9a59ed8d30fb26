"""Foreign forward hooks on modules that a graph would skip."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sized

from torch import nn
from torch.nn.modules import module as torch_module


class ForeignHooks:
    """Tells whether modules have forward hooks other than those of their routers.

    Args:
        modules: that a graph computes without calling them.
        gates: those of them to which a router has added its one hook.
    """

    def __init__(self, modules: Iterable[nn.Module], gates: Collection[nn.Module] = ()) -> None:
        self._hooks: list[Sized] = []
        self._known: list[int] = []
        for module in modules:
            self._hooks.append(module._forward_hooks)
            self._known.append(1 if module in gates else 0)
            self._hooks.append(module._forward_pre_hooks)
            self._known.append(0)

    def present(self) -> bool:
        return list(map(len, self._hooks)) != self._known


def hooks_on_all() -> bool:
    """Whether anything watches every module of the process, as torch's global hooks do."""
    # torch has no public way to ask.
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
