"""The operator that rules name for decoder layers, whose one-token calls become graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.decode.layer_call import EagerLayer, LayerCall
from hybrimoe_plugin.decode.proof.block_glue import block_of
from hybrimoe_plugin.decode.proof.layer_glue import glue_of, traces
from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.operators.dense import DenseOperator


class GraphedLayer(DenseOperator):
    """A decoder layer that is called eagerly until it is connected to graphs for decoding.

    Which call serves it is decided once, by `decode.connect.connect_layers`, when the model is
    bound:

        CpuLayer     two ggml graphs for each token, on quantised matrices on the CPU
        CudaLayer    CUDA graphs around the experts' call, on a GPU
        EagerLayer   the layer itself: where neither applies, and until then

    Each layer is decided on by itself, by what its own code is shown to do (`decode.proof`).

    It stands in for the model's own layer in every respect: its children are the layer's own, so
    the names of parameters do not change.

    Attributes:
        eager: the model's own layer.
        layer_call: what serves calls.
        settings: of the rule.
        glue: how the layer puts its parts together; None where it does so in another form.
        block: the same of its routed experts; None where it has none, or in another form.
    """

    by_proof = True
    uses = ("graphs", "attention", "host_path")

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            key, gguf_loader, config, orig_module, **{**kwargs, "dense": "dequantised"}
        )
        settings = {name: value for name, value in kwargs.items() if not name.endswith("_device")}
        self.settings = Settings.of(settings)
        self.glue = glue_of(orig_module)
        self.block = None if self.glue is None else block_of(orig_module._modules[self.glue.mlp])
        self.eager = EagerLayer(orig_module)
        self.layer_call: LayerCall = self.eager
        # The same dict, not a copy. Rules replace modules inside the layer after the layer itself,
        # and do so in the layer that they have found; adapters do it here. Both must see it.
        self._modules = orig_module._modules
        self.training = orig_module.training

    @staticmethod
    def reason_against(layer: nn.Module) -> str:
        """Why it does not replace a module; empty where it does: layers of any form."""
        if any(trace.calls for trace in traces(layer)):
            return ""
        return "it is no decoder layer that takes and gives hidden states [batch, tokens, width]"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the model's own layer; `type()` gives the operator's.

        transformers (5.17, `utils/output_capturing.py`) finds the layers whose outputs are hidden
        states by `isinstance(module, MixtralDecoderLayer)` and the like. An operator that is none
        would leave `output_hidden_states=True` without the hidden states of its layer. Gradient
        checkpointing and device maps look for layers in this way too.
        """
        eager = self.__dict__.get("eager")
        return type(self) if eager is None else type(eager.module)

    def __getattr__(self, name: str) -> Any:
        """What the model reads of its own layer, beside the children."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            eager = self.__dict__.get("eager")
            if eager is None:
                raise
            return getattr(eager.module, name)

    @property
    def captured(self) -> bool:
        """Whether the next decode step of the running sequence replays CUDA graphs."""
        return self.layer_call.captured

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the layer: [B, T, H] from [B, T, H]. Raises: InputError: other dimensions."""
        if hidden_states.ndim != 3:
            raise InputError(
                f"{self.key}: expected [batch, tokens, width], found {list(hidden_states.shape)}"
            )
        return self.layer_call(hidden_states, *args, **kwargs)
