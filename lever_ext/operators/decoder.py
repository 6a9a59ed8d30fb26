"""The operator that rules name in place of a decoder layer: its weights live on flash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.gradients import outside_autograd
from hybrimoe_plugin.errors import BackendError, ConfigError, FlashError
from lever_ext.early_exit.gate import ExitGate
from lever_ext.flash.pack import FlashPack, Tensors
from lever_ext.flash.plan import packed_tensors
from lever_ext.flash.stream import WeightStream
from lever_ext.operators.transfer import LayerTransfer

DEVICES = ("cpu", "auto")


class FlashDecoderLayer(nn.Module):
    """A decoder layer whose parameters are views into the stream's buffers while it computes.

    Follows the operator contract.

    Args:
        key: qualified module name, e.g. `model.layers.3`.
        gguf_loader: the open flash pack.
        config: the model's configuration.
        orig_module: the layer, on the meta device; it computes, with the stream's weights.
        prefill_device, generate_device: cpu or auto.

    Raises:
        ConfigError: a device other than the CPU.
        FlashError: `gguf_loader` is no flash pack.
    """

    def __init__(
        self,
        key: str,
        gguf_loader: FlashPack,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str = "cpu",
        generate_device: str = "cpu",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_flash_kwargs(
            {"prefill_device": prefill_device, "generate_device": generate_device, **kwargs}
        )
        check_is_pack(key, gguf_loader)
        self.key = key
        self.pack = gguf_loader
        self.config = config
        self.layer = orig_module
        self.index = int(key.rpartition(".")[2])
        self._stream: WeightStream | None = None
        self._transfer: LayerTransfer | None = None
        self._gate: ExitGate | None = None
        self.sites: dict[str, tuple[nn.Module, str]] = {}
        """Qualified parameter name -> (module, its attribute)."""
        self._parameters_of: dict[int, dict[str, nn.Parameter]] = {}
        """Number of a memory of the stream -> parameters by qualified name."""

    @staticmethod
    def check_kwargs(kwargs: Mapping[str, Any]) -> None:
        """Raises: ConfigError: a device other than the CPU, or an unknown argument."""
        check_flash_kwargs(kwargs)

    def load(self) -> None:
        """Check that the pack's layer is this layer; nothing is read.

        Raises:
            FlashError: the layer or a tensor is missing or has another shape.
        """
        blocks = [block for block in self.pack.blocks("layer") if block.layer == self.index]
        if not blocks:
            raise FlashError(
                f"{self.pack.path}: the pack has no {self.key}; it was made from another model"
            )
        expected = {
            f"{self.key}.{name}": tuple(parameter.shape)
            for name, parameter in packed_tensors(self.layer).items()
        }
        found = {tensor.name: tensor.shape for tensor in blocks[0].tensors}
        if expected != found:
            wrong = sorted(set(expected.items()) ^ set(found.items()))[0]
            raise FlashError(
                f"{self.pack.path}: {wrong[0]} does not fit the model; the pack was made from "
                f"another one"
            )
        for name in found:
            inner = name.removeprefix(f"{self.key}.")
            path, _, leaf = inner.rpartition(".")
            self.sites[name] = (self.layer.get_submodule(path), leaf)

    def bind(
        self,
        stream: WeightStream,
        gate: ExitGate | None,
        transfer: LayerTransfer | None = None,
    ) -> None:
        """Connect to what the target shares. Mutates.

        Args:
            stream: hands out the weights.
            gate: the early exit, where pruning is on.
            transfer: brings inputs to the layer where an accelerator computes some layers.
        """
        self._stream = stream
        self._gate = gate
        self._transfer = transfer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer itself returns.

        Raises:
            BackendError: not bound to a stream. Going backward through the result raises it too.
            FlashError: the weights cannot be read.
        """
        if torch.is_grad_enabled():
            # The buffers are read into again before a backward pass would come to them.
            return outside_autograd(
                self.key, lambda: self.forward(hidden_states, *args, **kwargs), hidden_states
            )
        if self._stream is None:
            raise BackendError(
                f"{self.key}: not bound to a flash stream; use lever_ext.target.load_target"
            )
        slot, tensors = self._stream.acquire(self.index)
        try:
            self.install(slot, tensors)
            if self._gate is not None:
                hidden_states, kwargs = self._gate.enter(self.index, hidden_states, kwargs)
            if self._transfer is not None:
                return self._transfer.run(self.index, self.layer, (hidden_states, *args), kwargs)
            return self.layer(hidden_states, *args, **kwargs)
        finally:
            self._stream.release(self.index)

    def recover(self) -> None:
        """Clear what a pass that was cut off has left. Mutates."""
        if self._gate is not None:
            self._gate.close()

    def install(self, slot: int, tensors: Tensors) -> None:
        """Let the layer compute with what the stream gave. Mutates."""
        if slot not in self._parameters_of:
            self._parameters_of[slot] = as_parameters(tensors)
        self.set_parameters(self._parameters_of[slot])

    def set_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let the layer compute with these weights, by qualified name. Mutates."""
        for name, parameter in parameters.items():
            module, leaf = self.sites[name]
            if leaf in module._buffers:
                module._buffers[leaf] = parameter.data
            else:
                module._parameters[leaf] = parameter

    def __getattr__(self, name: str) -> Any:
        """Models ask layers for attributes of their own, such as `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def as_parameters(tensors: Tensors) -> dict[str, nn.Parameter]:
    """Tensors as parameters without gradients, over the same memory."""
    found = {}
    for name, tensor in tensors.items():
        found[name] = nn.Parameter(tensor, requires_grad=False)
    return found


def check_is_pack(key: str, loader: Any) -> None:
    """Raise FlashError where an operator was given something other than a flash pack."""
    if not isinstance(loader, FlashPack):
        raise FlashError(
            f"{key}: needs a flash pack, found {type(loader).__name__}; use "
            f"lever_ext.target.load_target"
        )


def check_flash_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raises: ConfigError: a device other than the CPU, or an unknown argument."""
    for name, value in kwargs.items():
        if name not in ("prefill_device", "generate_device"):
            raise ConfigError(
                f"unknown argument {name}; flash operators take prefill_device and generate_device"
            )
        if value not in DEVICES:
            raise ConfigError(f"{name}: expected {' or '.join(DEVICES)}, found {value!r}")
