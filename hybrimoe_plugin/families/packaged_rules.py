"""The rules files that come with the package, found by the model's family or by their own name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import RulesError, did_you_mean
from hybrimoe_plugin.families.registry import families
from hybrimoe_plugin.injection.rules import Rules
from hybrimoe_plugin.weights.layer_weights import has_experts

_OTHER_HOSTS = ("ktransformers", "lever")
"""Folders of files for classic kTransformers, and for models on flash."""

ANY = "Any-MoE.yaml"
"""Rules for families that have none of their own."""

_MODEL_CLASS = re.compile(r"^transformers\.models\.(\w+)\.")


def packaged() -> Path:
    """The folder of packaged rules."""
    return Path(str(files("optimize_rules")))


def rules_path(rules: str | Path | None, config: Any) -> Path:
    """The engine's rules file: as given, a packaged name, or that of the model's family.

    Raises:
        RulesError: no such file, or no packaged rules for this family.
    """
    if rules is None:
        return engine_rules(config.model_type)
    path = Path(rules)
    if path.exists():
        return path
    folder = packaged()
    for candidate in (folder / path, folder / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = packaged_names()
    raise RulesError(
        f"{rules}: no such rules file, and no packaged rules of that name; packaged are "
        f"{', '.join(names)}{did_you_mean(str(rules), names)}"
    )


def packaged_names() -> list[str]:
    """What `rules_path` takes as the name of packaged rules."""
    folder = packaged()
    found = []
    for path in folder.rglob("*.yaml"):
        name = path.relative_to(folder).with_suffix("")
        if name.parts[0] not in _OTHER_HOSTS:
            found.append(name.as_posix())
    return sorted(found)


def written_for(rules: Rules) -> set[str]:
    """Model types that rules name by classes of their modules; empty where they name none."""
    found = set()
    for rule in rules.rules:
        named = _MODEL_CLASS.match(rule.match_class or "")
        if named is not None:
            found.add(named[1])
    return found


def other_family(rules: Rules, model_type: str) -> str:
    """End of a message about rules that do not fit: that they are for models of other families.

    Empty where nothing says so.
    """
    kinds = written_for(rules)
    if not kinds or model_type in kinds:
        return ""
    offered = {family.model_type: family.rules.engine for family in families()}
    own = offered.get(model_type)
    advice = "" if own is None else f"; --rules {Path(own).stem} is for it, and the default"
    return f"; these rules are for {' and '.join(sorted(kinds))}, the model is {model_type}{advice}"


def engine_rules(model_type: str) -> Path:
    """Routed experts on CPU and accelerator: the family's own rules, else those for any.

    Raises:
        RulesError: a dense model.
    """
    offered = {family.model_type: family.rules.engine for family in families()}
    if any(family.is_dense for family in families() if family.model_type == model_type):
        raise RulesError(
            f"no packaged rules for model type {model_type!r}: it is a dense model, which has no "
            "experts to schedule. Use llama.cpp where it fits into memory; where it does not, make "
            "a target on flash of it with hybrimoe flash_pack"
        )
    return packaged() / (offered.get(model_type) or ANY)


def flash_rules(config: Any) -> Path:
    """The whole model on flash: the family's own rules, else those for any with routed experts.

    Args:
        config: of the model.

    Raises:
        RulesError: a dense model of a family that has none.
    """
    kind = config.model_type
    offered = {family.model_type: family.rules.flash for family in families()}
    if offered.get(kind) is None and has_experts(config):
        return packaged() / "lever" / ANY
    return _one_of(offered, kind, f"model type {kind!r} on flash")


def classic_rules(model_class: str, device: str) -> Path:
    """Classic kTransformers, by the class that config.json names; `device` is cpu or gpu.

    Raises:
        RulesError: none for this class.
    """
    offered = {
        family.model_class: family.rules.classic
        for family in families()
        if family.model_class is not None
    }
    path = _one_of(offered, model_class, model_class)
    return path.with_name(path.name.format(device=device))


def _one_of(offered: Mapping[str, str | None], wanted: str, shown: str) -> Path:
    name = offered.get(wanted)
    if name is None:
        known = sorted(kind for kind, file in offered.items() if file is not None)
        raise RulesError(f"no packaged rules for {shown} (there are for {', '.join(known)})")
    return packaged() / name
