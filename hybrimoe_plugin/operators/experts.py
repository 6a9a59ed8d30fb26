"""The operator that rules name in place of a model's routed experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.backends import Accelerator
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gradients import outside_autograd
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.engine import Engine, Router, Sent
from hybrimoe_plugin.engine.assemble import Devices
from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.operators.expert_form import read_form
from hybrimoe_plugin.operators.routers import GateRouter
from hybrimoe_plugin.weights.expert_form import ExpertForm
from hybrimoe_plugin.weights.find_experts import find_experts
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.layer_weights import LayerWeights, expert_counts

DENSE_SETTINGS = ("dense", "graphs", "attention", "host_path")
"""Settings of operators other than experts."""

DEVICES = "cpu, cuda, cuda:N or auto"


class HybriMoEExperts(nn.Module):
    """Routed experts of one layer, computed by the engine (kTransformers' operator contract).

    Args:
        key: qualified module name, e.g. `model.layers.3.mlp.experts`.
        gguf_loader: the open weights.
        config: the model's configuration.
        orig_module: the module that this one replaces, whose form is taken over; kept by the
            injection, not here. Without one, or with a list of experts as older models have it,
            experts are SwiGLU and of the config's sizes.
        prefill_device: where experts may run when a call is a prompt's: cpu, cuda, cuda:N or auto.
        generate_device: the same for calls of one token, or of a few rows of several conversations
            or of a draft's tree.
        settings: fields of `Settings`.

    Raises:
        ConfigError: a device or a setting is not valid, or the name of the module holds no layer's
            number.
        BackendError: the model's experts compute something that the engine does not.
    """

    uses = tuple(item.name for item in fields(Settings) if item.name not in DENSE_SETTINGS)
    """Settings that count here, for `hybrimoe explain`."""

    def __init__(
        self,
        key: str,
        gguf_loader: GGUFStore,
        config: Any,
        orig_module: nn.Module | None = None,
        prefill_device: str = "auto",
        generate_device: str = "auto",
        **settings: Any,
    ) -> None:
        # Not super(): the classic host's subclass has bases with other constructors.
        nn.Module.__init__(self)
        self.check_kwargs(
            {"prefill_device": prefill_device, "generate_device": generate_device, **settings}
        )
        # A rule that matches modules outside the layers is refused before anything is loaded.
        layer_of(key)
        self._form: ExpertForm | None = None
        if orig_module is not None and not isinstance(orig_module, nn.ModuleList):
            self._form = read_form(key, orig_module)
        elif getattr(config, "hidden_act", "silu") != "silu":
            raise BackendError(
                f"{key}: experts with activation {config.hidden_act!r} are not supported, only silu"
            )
        self.key = key
        self.store = gguf_loader
        self.config = config
        self.prefill_device = prefill_device
        self.generate_device = generate_device
        self.settings = Settings.of(settings)
        self.weights: LayerWeights | None = None
        self._engine: Engine | None = None
        self._position = -1
        self.override: Callable[..., torch.Tensor] | None = None
        """Called with `forward`'s three tensors in place of the engine, while a CUDA graph is
        captured around it.
        """

    @staticmethod
    def check_kwargs(kwargs: Mapping[str, Any]) -> None:
        """Validate a rule's kwargs before anything is built.

        Raises:
            ConfigError: naming field, value and allowed range.
        """
        rest = dict(kwargs)
        for name in ("prefill_device", "generate_device"):
            device = rest.pop(name, "auto")
            if device != "auto" and not _is_device(device):
                raise ConfigError(f"{name}: expected {DEVICES}, found {device!r}")
        Settings.of(rest)

    @property
    def devices(self) -> Devices:
        """Devices that the rules name for prompts and for answers."""
        return Devices(self.prefill_device, self.generate_device)

    @property
    def layer_index(self) -> int:
        """The decoder layer that the key names."""
        return layer_of(self.key)

    def load(self) -> None:
        """Take this layer's experts from the file; nothing is read or copied.

        Raises:
            WeightsError: as `find_weights`.
        """
        self.weights = self.find_weights()

    def find_weights(self) -> LayerWeights:
        """This layer's experts in the file, as views of its bytes.

        Raises:
            WeightsError: a tensor is missing or does not have the config's shape.
            ConfigError: the config describes no routed experts.
        """
        form = self._form or _plain_form(self.config)
        return find_experts(self.store, self.config, self.key, self.layer_index, form)

    def bind(self, engine: Engine, position: int) -> None:
        """Connect to the engine, in which this layer is the MoE layer at the given position."""
        self._engine, self._position = engine, position

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        sent: Sent | None = None,
    ) -> torch.Tensor:
        """[T, H] from hidden states [T, H], and ids and weights [T, K] of the model's own router.

        Args:
            sent: what a CUDA graph has already sent to the host.

        Raises:
            BackendError: the model was not bound to an engine. Backward through the result raises
                it too, unless plain torch computes all experts.
        """
        engine = self._bound()
        router = engine.routers[self._position]
        if sent is None and isinstance(router, GateRouter):
            # Not after a replay: a replayed router calls no hook, and has sent its scores.
            router.take(hidden_states.shape[0])
        if self.override is not None:
            return self.override(hidden_states, top_k_index, top_k_weights)
        if torch.is_grad_enabled() and not _differentiable(engine):
            call = functools.partial(
                engine.run, self._position, hidden_states, top_k_index, top_k_weights, sent
            )
            return outside_autograd(self.key, call, hidden_states, top_k_weights)
        return engine.run(self._position, hidden_states, top_k_index, top_k_weights, sent)

    def routers(self) -> tuple[Router, list[Router]]:
        """This layer's router, and those whose choices the engine predicts at this layer.

        Raises:
            BackendError: as `forward`.
        """
        engine = self._bound()
        return engine.routers[self._position], engine.later_routers(self._position)

    def recover(self) -> None:
        """Clear what an interrupted or failed pass has left."""
        self.override = None
        self._bound().rows = None
        router, _ = self.routers()
        if isinstance(router, GateRouter):
            router.recover()

    @property
    def accelerator(self) -> Accelerator | None:
        """The engine's. Raises: as `forward`."""
        return self._bound().accelerator

    @property
    def place(self) -> tuple[Engine, int]:
        """The engine, and which of its layers this is. Raises: as `forward`."""
        return self._bound(), self._position

    @property
    def unplanned(self) -> bool:
        """Whether nothing but the result depends on the tokens of a call. Raises: as `forward`.

        A call whose rows are told must have all of them.
        """
        engine = self._bound()
        return engine.unplanned and engine.rows is None

    def _bound(self) -> Engine:
        if self._engine is None:
            raise BackendError(
                f"{self.key}: not bound to an engine; call "
                f"hybrimoe_plugin.operators.bind.bind(model)"
            )
        return self._engine

    def extra_repr(self) -> str:
        return (
            f"key={self.key!r}, prefill_device={self.prefill_device!r}, "
            f"generate_device={self.generate_device!r}"
        )


def _plain_form(config: Any) -> ExpertForm:
    """Experts as the config has them, without a module to look at. Raises: ConfigError: none."""
    experts, intermediate = expert_counts(config)
    return ExpertForm(experts, config.hidden_size, intermediate)


def layer_of(key: str) -> int:
    """The decoder layer that a module's name holds.

    Raises:
        ConfigError: it holds no number.
    """
    for part in key.split("."):
        if part.isdecimal():
            return int(part)
    raise ConfigError(
        f"{key!r} is no module of a decoder layer: an experts operator replaces routed experts only"
    )


def _differentiable(engine: Engine) -> bool:
    """Whether autograd can follow a call: torch's own operations from the input to the result."""
    return (
        engine.accelerator is None
        and engine.recorder is None
        and isinstance(engine.cpu, TorchExperts)
    )


def _is_device(name: object) -> bool:
    if not isinstance(name, str):
        return False
    kind, _, index = name.partition(":")
    return kind in ("cpu", "cuda") and (not index or (kind == "cuda" and index.isdigit()))
