"""What the rest of the tree has to know about a model family, as one declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import Draft
from hybrimoe_plugin.weights.gguf_names import GGUFNames


class LayerForm(Enum):
    """The form of decoder layers, where it is known beforehand.

    Both are pre-norm with two residual sums: x + attention(norm(x)), and then x + mlp(norm(x)).
    Drafts of the dense form are computed step by step. Graphs for decoding do not ask: they find
    out what a layer does (`decode.proof`).
    """

    DENSE = "grouped-query attention with rotary embedding, and a gated MLP"
    MOE = "grouped-query or latent attention, and routed experts, a gated MLP, or both"


@dataclass(frozen=True)
class PackagedRules:
    """The family's files in `optimize_rules`; None where there is none."""

    engine: str | None = None
    """Routed experts on CPU and accelerator, in current transformers: `Mixtral.yaml`."""
    flash: str | None = None
    """The whole model on flash: `lever/mixtral.yaml`."""
    classic: str | None = None
    """Classic kTransformers, where `{device}` is cpu or gpu: `ktransformers/Mixtral-{device}.yaml`.
    """


def _always(_facts: Facts) -> bool:
    return True


def _nothing(_config: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One model family: its names, and how its GGUF files become a transformers model."""

    model_type: str
    """transformers' name of it, as in config.json."""
    architectures: tuple[str, ...]
    """GGUF architectures of its files; the first one is written."""
    describe: Callable[[Facts, Draft], None]
    """Reads the metadata of a file into values of the transformers config.

    Raises WeightsError where a value is missing or out of range. A key that it does not read must
    have a neutral value, else the file is refused.
    """
    also_called: tuple[str, ...] = ()
    """Model types under which config.json files describe the same model, with code beside them
    because transformers does not know the type."""
    holds: Callable[[Facts], bool] = _always
    """Whether a file of these architectures is of this family, where several share one."""
    is_one_of_several: bool = False
    """Whether files that do not say which family they are of may be of this one."""
    stored_as: str | None = None
    """Model type that its files are taken for, as they look the same; a config.json tells it."""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Metadata key -> values that change nothing in this family, beside those neutral in all."""
    activation: str = "silu"
    """What its files take for granted, as no key states it."""
    activation_name: str = "hidden_act"
    """The config's name for it."""
    names: GGUFNames = field(default_factory=GGUFNames)
    """Where its files deviate from the `gguf` package's map of tensor names."""
    spare_tensors: tuple[str, ...] = ()
    """How the names of a layer's tensors begin which files may hold for layers without use of them.
    """
    metadata: Callable[[Any], Mapping[str, Any]] = _nothing
    """The reverse of `describe` for its own keys: from a config, to write a file."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the config that no file states -> the value that is taken for granted."""
    yarn_mscale: bool = False
    """Whether files state yarn's `mscale_all_dim`, as a tenth of it in `yarn_log_multiplier`."""
    wide_activations: bool = False
    """Whether activations are known to leave the range of float16, so that packs are bfloat16."""
    rules: PackagedRules = field(default_factory=PackagedRules)
    """Rules files that come with the package."""
    model_class: str | None = None
    """The class that config.json names under `architectures`, by which classic rules are found."""
    layers: LayerForm | None = None
    """Form of its decoder layers; None where they are only ever called as modules."""
    usual_split: str | None = None
    """How its tokenizers split text where a file does not say (`tokenizer.ggml.pre`)."""

    @property
    def is_dense(self) -> bool:
        """Whether its layers are known to have no routed experts."""
        return self.layers is LayerForm.DENSE
