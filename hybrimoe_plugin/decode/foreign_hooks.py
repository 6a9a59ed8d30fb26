"""What others have put on modules that a graph would skip: forward hooks, and other forwards."""

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
        self._empty: list[Sized] = []
        """Dicts of hooks in which there are none as long as nobody adds one."""
        self._single: list[Sized] = []
        """Those with a router's one hook."""
        for module in modules:
            hooks = self._single if module in gates else self._empty
            hooks.append(module._forward_hooks)
            self._empty.append(module._forward_pre_hooks)
        self._ones = [1] * len(self._single)

    def present(self) -> bool:
        # Asked in every layer of every token: `any` is faster than counting.
        return any(self._empty) or list(map(len, self._single)) != self._ones


def hooks_on_all() -> bool:
    """Whether anything watches every module of the process, as torch's global hooks do."""
    # torch has no public way to ask.
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module still computes by its class's `forward`, around which only turns are."""
    forward = module.forward
    method = getattr(forward, "__wrapped__", forward)
    return getattr(method, "__func__", None) is type(module).forward
