"""Results that are computed outside torch's autograd: right going forward, refused going
backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from hybrimoe_plugin.errors import BackendError

T = TypeVar("T")


class _Refusing(torch.autograd.Function):
    """Passes a value on; its backward is an error."""

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
    """The result of a call that autograd cannot follow; going backward through it raises instead of
    being skipped.

    Operators come here while gradients are enabled, so inference under `torch.no_grad` pays nothing
    for it.

    Args:
        what: is computed so; the error's message names it.
        call: gives a tensor, or a list or tuple in which there are tensors; runs without gradients.
        inputs: what the result depends on; where none of them requires a gradient, neither does the
            result.

    Returns:
        The same values; tensors are copies where a gradient is asked for. `backward()` through them
        raises BackendError.
    """
    with torch.no_grad():
        result = call()
    asking = [value for value in inputs if value is not None and value.requires_grad]
    return _guarded(what, result, asking) if asking else result


def _guarded(what: str, result: Any, inputs: Sequence[torch.Tensor]) -> Any:
    if isinstance(result, torch.Tensor):
        return _Refusing.apply(what, result, *inputs)
    if isinstance(result, list | tuple):
        return type(result)(_guarded(what, value, inputs) for value in result)
    return result
