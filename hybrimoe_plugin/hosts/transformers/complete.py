"""Checks that a file has every tensor of the model, and none that the model has no place for."""

from __future__ import annotations

import re
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_rope import (
    FACTORS,
    LONG_FACTORS,
    OLD_FREQUENCIES,
    SHORT_FACTORS,
)
from hybrimoe_plugin.families.registry import names_of, spare_tensors
from hybrimoe_plugin.weights.checkpoint.names import find_names
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.parameter_source import ParameterSource
from hybrimoe_plugin.weights.safetensors_store import SafetensorsStore

_SHOWN = 8
_LAYER = re.compile(r"^blk\.(\d+)\.(.*)$")


def check_complete(model: Any, store: GGUFStore, config: Any) -> None:
    """Compare the names of all tensors with the model's parameters, before a weight is read.

    Args:
        model: as transformers builds it, usually on the meta device.
        store: a checkpoint learns by this which tensors are which parameters.

    Raises:
        WeightsError: naming the tensors that are missing, and those that no parameter of the model
            is made from.
    """
    if isinstance(store, SafetensorsStore):
        store.names = find_names(model, store.tensors, str(store.paths[0].parent))
        return
    tensors = store.tensors
    used = _parts(model, ParameterSource(store, config, names_of(config.model_type)))
    ahead = Facts(store).integer("nextn_predict_layers", 0) > 0
    wrong = []
    missing = [name for name in used if name not in tensors]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        wrong.append(f"tensor {_listed(missing)} {verb} missing")
    others = [name for name in tensors if name not in used]
    unused = [name for name in others if not _needless(name, store, config, ahead)]
    if unused:
        wrong.append(
            f"a {config.model_type} model has no place for {_listed(unused)}, "
            "without which its answers would be wrong"
        )
    if wrong:
        raise WeightsError(f"{store.paths[0]}: {'; '.join(wrong)}")


def _parts(model: Any, source: ParameterSource) -> dict[str, None]:
    """The tensors that parameters are made from, each once."""
    found: dict[str, None] = {}
    for name in model.state_dict():
        found.update(dict.fromkeys(source.parts(name)))
    return found


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    if len(names) <= _SHOWN:
        return shown
    return f"{shown} and {len(names) - _SHOWN} more"


def _needless(name: str, store: GGUFStore, config: Any, ahead: bool) -> bool:
    """Whether a tensor that is no parameter may be skipped."""
    if name == FACTORS or (name in (LONG_FACTORS, SHORT_FACTORS) and _is_longrope(config)):
        return True  # `read_rope` has read it: it is in the config
    found = _LAYER.match(name)
    if found is None:
        return False
    layer, part = int(found[1]), found[2]
    if part == OLD_FREQUENCIES:
        return True  # `read_rope` has compared it
    if part.startswith(spare_tensors(config.model_type)):
        return True
    if ahead and layer >= config.num_hidden_layers:
        return True  # a layer that predicts further tokens; plain decoding does not use it
    if part != "attn_kv_b.weight":
        return False
    # Not needed where its halves are there too: the same matrix twice.
    halves = (
        f"blk.{layer}.attn_k_b.weight",
        f"blk.{layer}.attn_v_b.weight",
    )
    return all(half in store.tensors for half in halves)


def _is_longrope(config: Any) -> bool:
    return bool(config.rope_parameters.get("rope_type") == "longrope")
