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
from lever_ext.flash.split_stream import SplitStream
from lever_ext.flash.stream import LayerStream
from lever_ext.operators.carry import Carrier

DEVICES = ("cpu", "auto")


class FlashDecoderLayer(nn.Module):
    """A decoder layer whose parameters are views into the stream's buffers while it computes
    (operator contract).

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
        if not isinstance(gguf_loader, FlashPack):
            raise FlashError(
                f"{key}: needs a flash pack, found {type(gguf_loader).__name__}; use "
                f"lever_ext.target.load_target"
            )
        self.key = key
        self.pack = gguf_loader
        self.config = config
        self.layer = orig_module
        self.index = int(key.rpartition(".")[2])
        self._stream: LayerStream | SplitStream | None = None
        self._carrier: Carrier | None = None
        self._gate: ExitGate | None = None
        self.sites: dict[str, tuple[nn.Module, str]] = {}
        self._parameters_of: dict[int, dict[str, nn.Parameter]] = {}

    @staticmethod
    def check_kwargs(kwargs: Mapping[str, Any]) -> None:
        """Raises: ConfigError: a device other than the CPU, or an unknown argument."""
        check_flash_kwargs(kwargs)

    def load(self) -> None:
        """Check that the pack's layer is this layer; nothing is read.

        Raises:
            FlashError: the layer or a tensor is missing or has another shape.
        """
        block = next(
            (block for block in self.pack.blocks("layer") if block.layer == self.index), None
        )
        if block is None:
            raise FlashError(
                f"{self.pack.path}: the pack has no {self.key}; it was made from another model"
            )
        expected = {
            f"{self.key}.{name}": tuple(p.shape) for name, p in self.layer.named_parameters()
        }
        found = {tensor.name: tensor.shape for tensor in block.tensors}
        if expected != found:
            wrong = sorted(set(expected.items()) ^ set(found.items()))[0]
            raise FlashError(
                f"{self.pack.path}: {wrong[0]} does not fit the model; the pack was made from "
                f"another one"
            )
        for name in found:
            path, _, leaf = name[len(self.key) + 1 :].rpartition(".")
            self.sites[name] = (self.layer.get_submodule(path), leaf)

    def bind(
        self,
        stream: LayerStream | SplitStream,
        gate: ExitGate | None,
        carrier: Carrier | None = None,
    ) -> None:
        """Connect to the target's stream and, where pruning is on, its early exit.

        Args:
            carrier: brings inputs to the layer's side where an accelerator computes some layers.
        """
        self._stream, self._gate, self._carrier = stream, gate, carrier

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
            if self._carrier is not None:
                return self._carrier.run(self.index, self.layer, (hidden_states, *args), kwargs)
            return self.layer(hidden_states, *args, **kwargs)
        finally:
            self._stream.release(self.index)

    def recover(self) -> None:
        """Clear what a pass has left that did not come to its end. Mutates."""
        if self._gate is not None:
            self._gate.close()

    def install(self, slot: int, tensors: Tensors) -> None:
        """Let the layer compute with what the stream gave. Mutates."""
        if slot not in self._parameters_of:
            self._parameters_of[slot] = {
                name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()
            }
        self.set_parameters(self._parameters_of[slot])

    def set_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let the layer compute with these weights, by qualified name. Mutates."""
        for name, parameter in parameters.items():
            module, leaf = self.sites[name]
            module._parameters[leaf] = parameter

    def __getattr__(self, name: str) -> Any:
        """Models ask layers for attributes of their own, such as `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def check_flash_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raises: ConfigError: a device other than the CPU, or an unknown argument."""
    for name, value in kwargs.items():
        if name not in ("prefill_device", "generate_device"):
            raise ConfigError(
                f"unknown argument {name}; flash operators take prefill_device and generate_device"
            )
        if value not in DEVICES:
            raise ConfigError(f"{name}: expected {' or '.join(DEVICES)}, found {value!r}")
