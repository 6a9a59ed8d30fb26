"""The names of a checkpoint's tensors as the model's parameters: transformers' own conversions.

Checkpoints keep the names of the release that wrote them. transformers has a list of conversions
for each family, which load all of them; here the names are converted, and no tensor is copied. So
conversions that compute something are refused, except that routed experts may be kept one by one,
or stacked with gate and up in one tensor:

    model.layers.0.block_sparse_moe.experts.7.w3.weight -> blk.0.ffn_up.7.weight
    model.layers.0.mlp.experts.gate_up_proj [E, 2I, H]  -> blk.0.ffn_{gate,up}.{0..E-1}.weight
    model.layers.0.mlp.experts.down_proj [E, H, I]      -> blk.0.ffn_down_exps.weight
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.gguf_header import TensorInfo
from hybrimoe_plugin.weights.gguf_names import DOWN, GATE_UP, layer_number

READABLE = ("BF16", "F16", "F32")
"""Types that are GGML's too."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_COMPUTED = ".rotary_emb.inv_freq"


class CheckpointNames:
    """Names of one model's tensors.

    Args:
        model: as transformers builds it, usually on the meta device.
        where: the checkpoint, for messages.
        types: GGML types that tensors may be of.
    """

    def __init__(self, model: Any, where: str, types: Container[str] = READABLE) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self._where = where
        self._types = types
        self._parameters = model.state_dict()
        steps = get_model_conversion_mapping(model)
        self._renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self._converters = [step for step in steps if isinstance(step, WeightConverter)]
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored = [re.compile(pattern) for pattern in ignored]

    def views(self, tensors: Iterable[TensorInfo]) -> Iterator[TensorInfo]:
        """The same bytes under the names that the model's parts ask for.

        Tensors that the model does not need are left out; those that it has no place for keep their
        names.

        Raises:
            WeightsError: a tensor is of a type that is not read, or would have to be converted.
        """
        for info in tensors:
            name, pattern = self._parameter(info.name)
            if name not in self._parameters:
                if not self._needless(name):
                    yield info
                continue
            if info.type_name not in self._types:
                raise WeightsError(
                    f"{self._where}: tensor {info.name!r} is stored as {info.type_name}; "
                    f"{', '.join(READABLE)} are read as they are: make a GGUF of a quantised "
                    f"checkpoint with hybrimoe convert {self._where}"
                )
            if name.endswith((GATE_UP, DOWN)):
                self._check_form(name)
                yield from self._experts(info, name, pattern)
            elif pattern is None:
                yield replace(info, name=name)
            else:
                raise self._refused(info.name, name)

    def _parameter(self, tensor: str) -> tuple[str, str | None]:
        """A tensor's parameter, and the pattern of the conversion that makes it, if any."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        renamed, pattern = rename_source_key(
            tensor, self._renamings, self._converters, prefix, self._parameters
        )
        if renamed not in self._parameters and tensor in self._parameters:
            return tensor, None
        return renamed, pattern

    def _needless(self, name: str) -> bool:
        """Whether a tensor that is no parameter may be left out."""
        found = _LAYER.search(name)
        if found is not None and int(found[1]) >= self._model.config.num_hidden_layers:
            return True  # a layer that predicts further tokens; plain decoding does not use it
        if name.endswith(_COMPUTED):  # from the config
            return True
        return any(pattern.search(name) for pattern in self._ignored)

    def _check_form(self, name: str) -> None:
        """Raise WeightsError for experts whose matrices are not rows of outputs, gate before up."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        plain = (("is_transposed", False), ("is_concatenated", True), ("has_gate", True))
        if any(getattr(module, flag, usual) is not usual for flag, usual in plain):
            raise WeightsError(
                f"{self._where}: {type(module).__name__} stores its matrices in another order than "
                "kernels read: a GGUF file of this model has them in the right one"
            )

    def _experts(self, info: TensorInfo, name: str, pattern: str | None) -> Iterator[TensorInfo]:
        """Views of one tensor of routed experts."""
        layer = f"blk.{layer_number(name)}"
        if pattern is not None:
            yield self._single(info, name, pattern, layer)
            return
        shape = tuple(self._parameters[name].shape)
        if info.shape != shape or not info.nbytes:
            raise WeightsError(
                f"{self._where}: tensor {info.name!r} has shape {info.shape}, the model's config "
                f"asks for {shape}"
            )
        if name.endswith(DOWN):
            yield replace(info, name=f"{layer}.ffn_down_exps.weight")
            return
        experts, rows, columns = shape
        nbytes = info.nbytes // (2 * experts)
        for place in range(2 * experts):
            part = ("gate", "up")[place % 2]
            yield replace(
                info,
                name=f"{layer}.ffn_{part}.{place // 2}.weight",
                shape=(rows // 2, columns),
                nbytes=nbytes,
                offset=info.offset + place * nbytes,
            )

    def _single(self, info: TensorInfo, name: str, pattern: str, layer: str) -> TensorInfo:
        """The view of a tensor that is one expert's. Raises: WeightsError: it is not only that."""
        converter = next(step for step in self._converters if pattern in step.source_patterns)
        steps = [(type(step).__name__, step.dim) for step in _with_dim(converter.operations)]
        merges = [("MergeModulelist", 0)]
        if name.endswith(GATE_UP):
            merges.append(("Concatenate", 1))
        parts = ("gate", "up") if name.endswith(GATE_UP) else ("down",)
        expert = _EXPERT.search(info.name)
        found = len(steps), len(converter.source_patterns)
        if steps != merges or found != (len(converter.operations), len(parts)) or expert is None:
            raise self._refused(info.name, name)
        part = parts[converter.source_patterns.index(pattern)]
        return replace(info, name=f"{layer}.ffn_{part}.{int(expert[1])}.weight")

    def _refused(self, tensor: str, name: str) -> WeightsError:
        return WeightsError(
            f"{self._where}: tensor {tensor!r} would have to be converted to make {name!r}, which "
            "is not done: save the model with a current transformers (model.save_pretrained(DIR, "
            "save_original_format=False)), or take a GGUF file of it"
        )


def _with_dim(operations: Iterable[Any]) -> list[Any]:
    return [step for step in operations if hasattr(step, "dim")]
