"""Whether what follows the last layer's attention may be computed for a prompt's last tokens only.

Three things are shown on stand-ins and twins: that the layer calls what follows its attention with
hidden states and nothing else, that each of these parts computes token by token, and that the model
makes the same logits of a last layer's last tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.decode.proof.block_glue import Experts
from hybrimoe_plugin.decode.proof.layer_glue import Traced, traces
from hybrimoe_plugin.decode.proof.stand_ins import StandIn, copy_with, random_hidden, same
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.linear import GgmlLinear
from hybrimoe_plugin.operators.proof.stage import handing_on
from hybrimoe_plugin.operators.proof.twin import LowRankLinear, bare_copy, twin

_KEPT = (1, 3)
"""Numbers of last tokens that are tried."""


class LastRows(nn.Module):
    """Calls a part with the last tokens of what it is given; the others' results are zeros.

    Args:
        find: gives the part.
        keep: gives the number of tokens.
    """

    def __init__(self, find: Callable[[], nn.Module], keep: Callable[[], int]) -> None:
        super().__init__()
        self._find = find
        self._keep = keep

    def forward(self, hidden: torch.Tensor) -> Any:
        """[B, T, H], or a tuple of that and what else the part gives, from [B, T, H]."""
        keep = self._keep()
        output = self._find()(hidden[:, -keep:].contiguous())
        found = _first(output)
        whole = found.new_zeros(*hidden.shape[:2], found.shape[-1])
        whole[:, -keep:] = found
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def parts_behind_attention(layer: nn.Module) -> tuple[str, ...] | None:
    """Names of a layer's children that may be given the last tokens only; None where not all may.

    Operators may have replaced modules inside the layer: they were proved to be what those are.
    """
    for trace in traces(layer):
        names = _behind(trace)
        if names and _is_same_cut(trace, names):
            width = trace.hidden.shape[-1]
            by_token = all(_is_by_token(layer.get_submodule(name), width) for name in names)
            return names if by_token else None
    return None


def head_takes_last_tokens(model: Any, path: tuple[str, ...]) -> bool:
    """Whether the model's logits are the same if its last layer gives the last tokens only.

    Args:
        model: a causal language model.
        path: names from it down to its list of layers.
    """
    try:
        return _head_takes_last_tokens(model, path)
    except Exception:  # models are many, and raise anything
        return False


def _behind(trace: Traced) -> tuple[str, ...]:
    """Children called behind the one that mixes tokens; none if they are not of the kind."""
    mixer = trace.mixer
    names = [call.name for call in trace.calls]
    if mixer is None or len(set(names)) != len(names):
        return ()
    behind = trace.calls[mixer + 1 :]
    if all(call.is_of_one and call.hidden.shape == trace.hidden.shape for call in behind):
        return tuple(call.name for call in behind)
    return ()


@torch.no_grad()
def _is_same_cut(trace: Traced, names: tuple[str, ...]) -> bool:
    for keep in _KEPT:
        cut = bare_copy(trace.layer)
        for name in names:
            find = partial(trace.layer.get_submodule, name)
            cut._modules[name] = LastRows(find, partial(int, keep))
        output = cut.forward(trace.hidden, **trace.named)
        if not same(output[:, -keep:], trace.output[:, -keep:]):
            return False
    return True


@torch.no_grad()
def _is_by_token(part: nn.Module, width: int) -> bool:
    """Whether a part's twin gives the same for tokens with and without others before them."""
    try:
        made = _by_token_copy("part", part)
        hidden = random_hidden(width)
        whole = _first(made(hidden))
        parts = [(keep, _first(made(hidden[:, -keep:].contiguous()))) for keep in _KEPT]
    except Exception:  # code that was not made for twins may raise anything
        return False
    return all(same(found, whole[:, -keep:]) for keep, found in parts)


def _by_token_copy(name: str, module: nn.Module) -> Any:
    """A twin, but for routed experts, which an operator computes token by token."""
    if name == "experts" or hasattr(module, "has_gate"):
        return Experts(name, module, [])
    if isinstance(module, DenseOperator | GgmlLinear) or type(module) is nn.Linear:
        return _stand_in(name, module)
    return copy_with(module, _by_token_copy).eval()


@torch.no_grad()
def _head_takes_last_tokens(model: Any, path: tuple[str, ...]) -> bool:
    width = model.config.get_text_config().hidden_size
    hidden = random_hidden(width)
    given = {"inputs_embeds": hidden, "use_cache": False}
    whole = _with_last_layer(model, path, hidden.shape[1])(**given).logits
    for keep in _KEPT:
        cut = _with_last_layer(model, path, keep)
        if not same(cut(**given, logits_to_keep=keep).logits, whole[:, -keep:]):
            return False
    return True


def _with_last_layer(module: Any, path: tuple[str, ...], keep: int) -> Any:
    """A copy of a model whose layers hand on what they get, the last one its last tokens."""
    if not path:
        layers = [handing_on(layer) for layer in module]
        handed_on = layers[-1].forward
        layers[-1].__dict__["forward"] = lambda *args, **kwargs: handed_on(*args, **kwargs)[
            :, -keep:
        ]
        return nn.ModuleList(layers)
    made = bare_copy(module)
    for name, child in module._modules.items():
        if name == path[0]:
            made._modules[name] = _with_last_layer(child, path[1:], keep)
        elif child is not None:
            made._modules[name] = _stand_in(name, child)
    return made.eval()


def _stand_in(name: str, module: Any) -> nn.Module:
    """For a part whose values do not matter: an operator, an embedding, a norm, the head."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, DenseOperator | GgmlLinear):
        if hasattr(module, "out_features"):
            return LowRankLinear(module, generator)
        return StandIn(name, module, [])
    if isinstance(module, nn.Embedding) or not any(True for _ in module.parameters()):
        kept: nn.Module = module
        return kept
    made: nn.Module = twin(module, generator)
    return made


def _first(output: Any) -> torch.Tensor:
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first
