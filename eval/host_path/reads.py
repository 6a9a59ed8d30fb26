"""Operations on the device as the dispatcher sees them: which of them would stop the host?

The device is torch's `meta` device: its operations cost a dispatch and compute nothing. What reads
its values on the host fails there, so that no read can be overlooked in a timed run. While a model
is loaded, and in a recorded token, this mode answers such reads with zeros instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.host_path.driver import Driver, Number

VALUES = ("_local_scalar_dense", "equal", "is_nonzero")
"""Operations that give the host a value."""
SIZES = ("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive")
"""Operations whose result has a size that depends on values."""
VIEWS = ("view", "slice", "select", "detach", "unsqueeze", "expand", "t", "transpose", "alias")
"""Operations that start nothing on the device; some of them."""


class Reads(TorchDispatchMode):
    """Answers reads of the device, and records every operation on it."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if name == "copy_":
            return self._copy(func, args, kwargs)
        if name == "_to_copy":
            return self._converted(func, args, kwargs)
        on_device = [value for value in given if value.is_meta]
        if not on_device:
            return func(*args, **kwargs)
        if name in VALUES:
            self._note(name, "reads a value")
            return True if name == "equal" else _zero(on_device[0])
        if name in SIZES:
            self._note(name, "needs a size that depends on values")
            return torch.empty(0, on_device[0].ndim, dtype=torch.int64, device="meta")
        if name not in VIEWS:
            self._note(name, "")
        if name in ("add_", "fill_", "zero_"):
            self._follow(name, *args)
        return func(*args, **kwargs)

    def _follow(self, name: str, target: torch.Tensor, *values: Any) -> None:
        """Keep the value of what may be a mark: one whole number."""
        if target.numel() != 1 or target.dtype != torch.int64:
            return
        value = values[0] if values else 0
        if isinstance(value, torch.Tensor):
            return
        number = self._driver.numbers.setdefault(_address(target), Number(target))
        change = number.add if name == "add_" else number.put
        self._driver.do(functools.partial(change, int(value)))

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source, *more = args
        arrives = self._cross(source, target.is_meta, *more, **kwargs)
        if self._driver.edges is not None and target.is_meta and target.dtype == torch.uint8:
            self._driver.use(target.data_ptr(), target.numel(), write=True)
        if not arrives:
            return func(*args, **kwargs)
        target.zero_()
        number = self._driver.numbers.get(_address(source))
        if number is not None:
            self._driver.do(functools.partial(number.show, target.numpy()))
        return target

    def _converted(self, func: Any, args: Any, kwargs: Any) -> Any:
        (source,) = args
        device = kwargs.get("device")
        to_device = source.is_meta if device is None else torch.device(device).type == "meta"
        if not self._cross(source, to_device, kwargs.get("non_blocking", False)):
            return func(*args, **kwargs)
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _cross(self, source: torch.Tensor, to_device: bool, non_blocking: bool = False) -> bool:
        """Record a copy; whether it arrives on the host."""
        stops = "" if non_blocking else "waits for its copy"
        if source.is_meta and not to_device:
            self._note("copy to the host", stops)
            return True
        if to_device:
            # torch waits for a copy from the host too, unless it is told not to.
            self._note(*("copy", "") if source.is_meta else ("copy to the device", stops))
        return False

    def _note(self, name: str, stops: str) -> None:
        if self._driver.graph is not None:
            if stops:
                raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
            return
        self._driver.note(name, self._driver.current.name, stops)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _zero(value: torch.Tensor) -> Any:
    return torch.zeros((), dtype=value.dtype).item()
