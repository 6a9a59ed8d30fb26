"""Makes an injected model refuse, by name, the uses that operators would get wrong.

Everything that is not named here gives what the plain model gives.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.errors import BackendError, InputError
from hybrimoe_plugin.injection.own_attributes import give_own
from hybrimoe_plugin.operators.attention import AttentionOperator
from hybrimoe_plugin.operators.dense import DenseOperator

_SAVING = (
    "the checkpoint would lack every weight that is read from the file as it is stored: "
    "keep that file, or save {}"
)
_COPYING = (
    "operators hold memory maps, threads and device memory that cannot be copied: load "
    "the file once more"
)
_VOCABULARY = "embedding and output head are read from the file as they are: resize {}"

REFUSED = {
    "save_pretrained": _SAVING,
    "push_to_hub": _SAVING,
    "__deepcopy__": _COPYING,
    "__reduce_ex__": _COPYING,
    "to_empty": "it would throw away weights that lie in operators too: load the file once more",
}
"""Method of a model -> why it is refused."""

_KNOWN_AS = {"__deepcopy__": "copy.deepcopy", "__reduce_ex__": "pickle and torch.save"}


class Guard:
    """Lets an injected model refuse what would go wrong without a word.

    Args:
        model: a transformers model with operators in it, ready to compute. Mutates: it and the
            models inside it, by attributes of the instances.
        plain: what the user can take in place of it.
    """

    def __init__(
        self, model: Any, plain: str = "the model of hybrimoe_plugin.load_plain_model"
    ) -> None:
        self._model = model
        self._plain = plain
        self._guards = [_Guard(module, plain) for module in _models(model)]

    def remove(self) -> None:
        """Take the refusals off again."""
        for each in self._guards:
            each.remove()

    def restored(self) -> None:
        """The original modules are back: refuse to compute or save while some have no weights."""
        _refuse_until_loaded(self._model, self._plain)


class _Guard:
    """The refusals of one model: a causal language model, or the base model inside it."""

    def __init__(self, model: Any, plain: str) -> None:
        self._model = model
        self._plain = plain
        operators = [module for module in model.modules() if isinstance(module, DenseOperator)]
        self._attention = any(isinstance(module, AttentionOperator) for module in operators)
        self._real = {
            name: getattr(model, name)
            for name in ("_apply", "set_attn_implementation", "state_dict")
        }
        own: dict[str, Callable[..., Any]] = {
            name: _refusal(_KNOWN_AS.get(name, f"{name}()"), why.format(plain))
            for name, why in REFUSED.items()
        }
        own["state_dict"] = self._states
        own["_apply"] = self._moved
        own["resize_token_embeddings"] = self._resized
        if operators:
            own["add_adapter"] = own["load_adapter"] = self._adapted
        if self._attention:
            own["set_attn_implementation"] = self._other_attention
            if model.config._attn_implementation != "sdpa":
                self._real["set_attn_implementation"](
                    "sdpa"
                )  # which these operators compute, whatever the config says
        own["forward"] = self._checked(model.forward)
        self.remove = give_own(model, own)
        """Puts everything back."""

    def _checked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        model, config = self._model, self._model.config
        if not self._attention:
            return call

        @functools.wraps(call)  # transformers reads names of arguments off a model's `forward`
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
                raise BackendError(
                    "output_attentions: attention weights are never computed by these operators; "
                    "load with dense='plain' and then set_attn_implementation('eager'), or take "
                    f"{self._plain}"
                )
            given = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(given, torch.Tensor) and not given.numel():
                raise InputError(f"input_ids of shape {list(given.shape)} hold no token")
            if model.training and getattr(config, "attention_dropout", 0.0):
                raise BackendError(
                    f"train(): attention_dropout is {config.attention_dropout}, and these "
                    "operators have none; load with dense='plain'"
                )
            return call(*args, **kwargs)

        return forward

    def _moved(
        self, change: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        """What `to`, `half`, `float` and `cuda` call: allowed where it changes nothing."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        for kind in {(tensor.dtype, tensor.device) for tensor in tensors}:
            try:
                probe = change(torch.empty(0, dtype=kind[0], device=kind[1]))
            except (
                Exception
            ) as error:  # torch has an error of its own for each device that is not there
                raise BackendError(f"to(): the model stays where it is: {error}") from error
            if (probe.dtype, probe.device) != kind:
                raise BackendError(
                    f"to(): weights that are {_name(*kind)} cannot become "
                    f"{_name(probe.dtype, probe.device)} once the model is loaded: load it with "
                    "dtype=..., and choose devices by rules and settings"
                )
        return self._real["_apply"](change, *args, **kwargs)

    def _states(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Refuse a state dict of the whole model.

        A module around this one, such as PEFT's, may collect what it finds and keep its own part.
        """
        if destination is None and not args:
            raise BackendError(
                "state_dict(): it would lack every weight that is read from the file as it is "
                f"stored: take {self._plain}, or named_parameters() for what this model holds "
                "itself"
            )
        return self._real["state_dict"](*args, destination=destination, **kwargs)

    def _resized(self, new_num_tokens: int | None = None, *_args: Any, **_kwargs: Any) -> Any:
        embedding = self._model.get_input_embeddings()
        if new_num_tokens in (None, embedding.num_embeddings):
            return embedding
        raise BackendError(f"resize_token_embeddings(): {_VOCABULARY.format(self._plain)}")

    def _adapted(self, *_args: Any, **_kwargs: Any) -> None:
        raise BackendError(
            "adapters change linear modules, which these operators replace: load with "
            f"dense='plain' and cpu_backend='torch', or take {self._plain}"
        )

    def _other_attention(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation != "sdpa":
            raise BackendError(
                f"set_attn_implementation({attn_implementation!r}): these operators compute "
                "attention themselves, as 'sdpa' does; load with dense='plain', or take "
                f"{self._plain}"
            )
        return self._real["set_attn_implementation"](attn_implementation, *args, **kwargs)


def _refusal(name: str, why: str) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise BackendError(f"{name}: {why}")

    return refuse


def _refuse_until_loaded(model: nn.Module, plain: str) -> None:
    """Make a restored model refuse to compute while weights are missing. Mutates: `model`.

    Original modules have none where the operators' matrices stayed in the file.
    """
    for module in _models(model):
        if _missing(module):
            calls = {
                name: getattr(module, name)
                for name in ("forward", "save_pretrained", "push_to_hub")
            }
            calls["__deepcopy__"] = functools.partial(copy.deepcopy, module)
            for name, call in calls.items():
                module.__dict__[name] = _loaded_first(module, name, call, tuple(calls), plain)


def _loaded_first(
    module: nn.Module, name: str, call: Callable[..., Any], names: Sequence[str], plain: str
) -> Callable[..., Any]:
    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        missing, known_as = _missing(module), _KNOWN_AS.get(name, f"{name}()")
        if missing:
            raise BackendError(
                f"{known_as}: this model was restored, and {missing[0]} ({len(missing)} tensors in "
                "all) never had weights of its own: load the file again with load_model, take "
                f"{plain}, or fill it with load_state_dict(..., assign=True)"
            )
        for each in names:
            module.__dict__.pop(each, None)
        return call(*args, **kwargs)

    return checked


def _missing(module: nn.Module) -> list[str]:
    return [name for name, value in module.named_parameters() if value.is_meta]


def _models(model: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _name(dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} on {device}"
