"""What a GGUF file says about its model, under the names of a transformers config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_rope import read_rope, read_sliding_rope
from hybrimoe_plugin.families.reading import Draft
from hybrimoe_plugin.families.registry import families, families_stored_as
from hybrimoe_plugin.families.rope import FULL, SLIDING, Rope, joined_parameters
from hybrimoe_plugin.weights.gguf_store import GGUFStore


class Description(NamedTuple):
    """A file's model; what `Draft` has too is explained there."""

    family: Family
    stated: Mapping[str, Any]
    assumed: Mapping[str, Any]
    by_layer: Mapping[str, Sequence[Any]]
    ropes: Mapping[str, Rope]
    """By the type of layers that have it; "" is that of all layers."""
    where: str
    """The file, for messages."""
    notices: Sequence[str]
    left_open: Sequence[str]

    def config(self) -> Any:
        """The transformers config.

        Raises:
            WeightsError: the file leaves something open, or transformers refuses the values.
        """
        from transformers import AutoConfig

        kind = self.family.model_type
        if self.left_open:
            raise WeightsError(
                f"{self.where}: it does not say {' and '.join(self.left_open)}: give the model's "
                "config.json with --model_path"
            )
        values = {**self.assumed, **self.stated}
        values["rope_parameters"] = joined_parameters(self.ropes)
        if self.by_layer:
            values |= {name: each[0] for name, each in self.by_layer.items()}
            each_layer = zip(*self.by_layer.values(), strict=True)
            values["per_layer_config"] = {
                layer: dict(zip(self.by_layer, own, strict=True))
                for layer, own in enumerate(each_layer)
            }
        try:
            return AutoConfig.for_model(kind, **values)
        except Exception as error:  # strict dataclass validation raises kinds of its own
            raise WeightsError(
                f"{self.where}: its metadata does not make a {kind} config ({error})"
            ) from error


def describe(store: GGUFStore) -> Description:
    """Read all of the GGUF metadata that concerns the model.

    Raises:
        WeightsError: an architecture without support, metadata missing or out of range, or a key
            that asks for what is not supported.
    """
    facts = Facts(store)
    kind = store.metadata.get("general.type", "model")
    if kind != "model":
        raise WeightsError(
            f"{facts.where}: general.type is {kind!r}, not 'model': it holds no whole model"
        )
    family = family_of_file(facts)
    draft = Draft(facts)
    family.describe(facts, draft)
    ropes = _read_ropes(facts, draft, family.yarn_mscale)
    facts.check_all_read(family.neutral)
    return Description(
        family,
        draft.stated,
        draft.assumed,
        draft.by_layer,
        ropes,
        facts.where,
        draft.notices,
        draft.left_open,
    )


def _read_ropes(facts: Facts, draft: Draft, mscale: bool) -> dict[str, Rope]:
    """The rotary embedding of all layers, or those of the two types of layers."""
    by_type = draft.sliding_rope_width > 0
    rope = read_rope(facts, draft.rope_width, mscale, by_type, draft.rope_by_context)
    rope = rope._replace(parameters={**rope.parameters, **draft.more_of_rope})
    if not by_type:
        return {"": rope}
    if rope.parameters["rope_type"] not in ("default", "proportional"):
        facts.refuse("a scaled rotary embedding beside another one of layers with a window")
    return {FULL: rope, SLIDING: read_sliding_rope(facts, draft.sliding_rope_width)}


def family_of_file(facts: Facts) -> Family:
    """The family of a file.

    Raises:
        WeightsError: none of them has files of this architecture, or like this one.
    """
    candidates = [
        family for family in families_stored_as(facts.architecture) if family.stored_as is None
    ]
    if not candidates:
        known = {name for family in families() for name in family.architectures}
        dense = "; it is a dense model, so use llama.cpp"
        if facts.get("expert_count", 0):
            dense = "; the model's checkpoint directory (safetensors) can be loaded instead"
        raise WeightsError(
            f"{facts.where}: GGUF architecture {facts.architecture!r} is not supported; "
            f"supported are {', '.join(sorted(known))}{dense}"
        )
    for family in candidates:
        if family.holds(facts):
            return family
    tried = ", ".join(family.model_type for family in candidates)
    raise WeightsError(
        f"{facts.where}: a file of architecture {facts.architecture!r}, but like none of {tried}"
    )
