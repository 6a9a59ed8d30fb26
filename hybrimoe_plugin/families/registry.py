"""The model families that are known: the built-in ones, and those that `register` adds."""

from __future__ import annotations

from collections.abc import Callable

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.families.builtin import BUILT_IN
from hybrimoe_plugin.families.family import Family, LayerForm
from hybrimoe_plugin.weights.gguf_names import GGUFNames

_FAMILIES: dict[str, Family] = {family.model_type: family for family in BUILT_IN}


def register(family: Family) -> Callable[[], None]:
    """Add a family; gives what takes it out again.

    Raises:
        ConfigError: there is one of this model type.
    """
    kind = family.model_type
    if kind in _FAMILIES:
        raise ConfigError(f"model type {kind!r}: there is a family of this type already")
    _FAMILIES[kind] = family

    def remove() -> None:
        _FAMILIES.pop(kind, None)

    return remove


def families() -> tuple[Family, ...]:
    """All of them, in the order in which they were added."""
    return tuple(_FAMILIES.values())


def find_family(model_type: str) -> Family | None:
    """The family of a transformers model type; None where there is none."""
    return _FAMILIES.get(model_type)


def family_of(model_type: str) -> Family:
    """The family of a transformers model type.

    Raises:
        ConfigError: there is none.
    """
    found = find_family(model_type)
    if found is None:
        known = ", ".join(sorted(_FAMILIES))
        raise ConfigError(f"model type {model_type!r}: no such family, only {known}")
    return found


def usual_type(model_type: object) -> object:
    """The type that transformers knows a model type by; the same where it needs no other one."""
    for family in families():
        if model_type in family.also_called:
            return family.model_type
    return model_type


def families_stored_as(architecture: str) -> tuple[Family, ...]:
    """The families whose GGUF files name an architecture."""
    return tuple(family for family in families() if architecture in family.architectures)


def names_of(model_type: str) -> GGUFNames:
    """How files of a model type deviate from the usual names; not at all for unknown types."""
    found = find_family(model_type)
    return GGUFNames() if found is None else found.names


def spare_tensors(model_type: str) -> tuple[str, ...]:
    """How names of a layer's tensors begin that files may hold where they have no use."""
    found = find_family(model_type)
    return () if found is None else found.spare_tensors


def layer_form(model_type: str) -> LayerForm | None:
    """The form of a model type's decoder layers; None where nothing is known of them."""
    found = find_family(model_type)
    return None if found is None else found.layers


def usual_split(architecture: str) -> str | None:
    """How tokenizers in files of an architecture split text where the file does not say."""
    for family in families_stored_as(architecture):
        if family.usual_split is not None:
            return family.usual_split
    return None
