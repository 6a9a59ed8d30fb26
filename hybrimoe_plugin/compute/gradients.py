"""Results computed outside autograd: correct in the forward pass, an error in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from hybrimoe_plugin.errors import BackendError

T = TypeVar("T")


class _RefuseBackward(torch.autograd.Function):
    """Passes a value through; its backward raises."""

    @staticmethod
    def forward(ctx: Any, what: str, value: torch.Tensor, *_inputs: torch.Tensor) -> torch.Tensor:
        ctx.what = what
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        raise BackendError(
            f"{ctx.what} is computed without gradients, so backward() would leave a part out: "
            f"train the plain "
            "transformers model (a GGUF has gradients, too, with cpu_backend='torch', "
            "dense='dequantised' and no "
            "accelerator); for inference call the model under torch.no_grad()"
        )


def outside_autograd(what: str, call: Callable[[], T], *inputs: torch.Tensor | None) -> T:
    """The result of a call that autograd cannot follow; backward through it raises.

    Without this, autograd would silently skip the call. Operators use it only while gradients are
    enabled, so inference under `torch.no_grad` pays nothing for it.

    Args:
        what: is computed this way; the error's message names it.
        call: returns a tensor, or a list or tuple that holds tensors; runs without gradients.
        inputs: what the result depends on; if none of them requires a gradient, the result does not
            either.

    Returns:
        The same values; tensors are copies where an input requires a gradient. `backward()` through
        them raises BackendError.
    """
    with torch.no_grad():
        result = call()
    differentiable = [value for value in inputs if value is not None and value.requires_grad]
    if not differentiable:
        return result
    return _guarded(what, result, differentiable)


def _guarded(what: str, result: Any, inputs: Sequence[torch.Tensor]) -> Any:
    if isinstance(result, torch.Tensor):
        return _RefuseBackward.apply(what, result, *inputs)
    if isinstance(result, list | tuple):
        return type(result)(_guarded(what, value, inputs) for value in result)
    return result
