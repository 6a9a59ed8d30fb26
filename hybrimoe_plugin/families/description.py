"""What a GGUF file says about its model, under the names of a transformers config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_rope import read_rope
from hybrimoe_plugin.families.reading import Draft
from hybrimoe_plugin.families.registry import families, families_stored_as
from hybrimoe_plugin.families.rope import Rope
from hybrimoe_plugin.weights.gguf_store import GGUFStore


class Description(NamedTuple):
    """A file's model; `stated`, `assumed` and `notices` are those of `Draft`."""

    family: Family
    stated: Mapping[str, Any]
    assumed: Mapping[str, Any]
    rope: Rope
    where: str
    """The file, for messages."""
    notices: Sequence[str]

    def config(self) -> Any:
        """The transformers config.

        Raises:
            WeightsError: transformers refuses the values.
        """
        from transformers import AutoConfig

        kind = self.family.model_type
        values = {**self.assumed, **self.stated}
        values["rope_parameters"] = self.rope.parameters
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
    rope = read_rope(facts, draft.rope_width, family.yarn_mscale)
    rope = rope._replace(parameters={**rope.parameters, **draft.more_of_rope})
    facts.check_all_read(family.neutral)
    return Description(family, draft.stated, draft.assumed, rope, facts.where, draft.notices)


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
