"""Rules for kTransformers 0.2 to 0.4, written anew for the default host.

What such a file decides is where each layer's experts are computed; that is kept, layer by layer.
The rest follows it here, so all other rules come from the packaged file of the model's family.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from hybrimoe_plugin.errors import RulesError
from hybrimoe_plugin.families.packaged_rules import engine_rules
from hybrimoe_plugin.files import one_line
from hybrimoe_plugin.injection.ktransformers_classes import (
    BLOCKS,
    KWARGS,
    MODELS,
    PACKAGE,
    Fate,
    find_moved,
)
from hybrimoe_plugin.injection.rules import DEFAULT, Rule, Rules, load_rules

_EXPERTS = "hybrimoe_plugin.operators.experts.HybriMoEExperts"
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_DEVICES = ("prefill_device", "generate_device", "out_device")
_QUANTISED = ("KLinearMarlin", "VLinearMarlin", "KLinearQ8")
"""Their linears that keep matrices quantised on a GPU."""
_FP8 = "KLinearFP8"


@dataclass(frozen=True)
class Translation:
    """A file in our form.

    Attributes:
        text: its YAML.
        family: model type that it is for.
        notes: what became of the old rules, one line each, in their order.
        needed: whether it does anything that the family's packaged rules do not.
    """

    text: str
    family: str
    notes: tuple[str, ...]
    needed: bool


def translate(rules: Rules) -> Translation:
    """Write kTransformers' rules in our form.

    Raises:
        RulesError: a rule names a class, device or model family that is not supported here, or the
            file has no rule for experts.
    """
    family = _family(rules)
    placed: list[dict[str, Any]] = []
    notes = []
    for rule in rules.rules:
        if _is_experts(rule):
            placed.append(_experts_rule(rule))
            device = placed[-1]["replace"]["kwargs"]["generate_device"]
            note = f"experts on {device}{_dropped(rule)}"
        else:
            note = _fate(rule)
        notes.append(f"rule {rule.index} (line {rule.line}): {note}")
    if not placed:
        raise RulesError(
            f"{rules.source}: no rule for experts (KTransformersExperts), so there is nothing to "
            f"place: the packaged rules for {family} need no file"
        )
    packaged = yaml.safe_load(engine_rules(family).read_text(encoding="utf-8"))
    written = _with_experts(packaged, placed)
    if any(rule.kwargs.get("generate_op") in _QUANTISED for rule in rules.rules):
        _keep_quantised(written)
    text = yaml.safe_dump(written, sort_keys=False, width=100)
    head = f"# {family}: devices of the experts as in {one_line(rules.source)}.\n"
    return Translation(head + text, family, tuple(notes), written != packaged)


def _family(rules: Rules) -> str:
    """The model type: of the MoE block that rules replace, else of the classes that they match."""
    kinds = {
        BLOCKS[name]
        for name in (rule.replace_class.rpartition(".")[2] for rule in rules.rules)
        if name in BLOCKS
    }
    if not kinds:
        kinds = set(_matched_families(rules))
    for rule in rules.rules:
        _refuse_foreign(rule)
    if len(kinds) != 1:
        found = (
            f"those of {' and '.join(sorted(kinds))}" if kinds else "none of a family known here"
        )
        raise RulesError(
            f"{rules.source}: which model is it for? Its rules name MoE blocks or model classes: "
            f"{found}; known are {', '.join(sorted(set(MODELS.values())))}"
        )
    return kinds.pop()


def _matched_families(rules: Rules) -> Iterator[str]:
    for rule in rules.rules:
        parts = (rule.match_class or "").split(".")
        if len(parts) < 3:
            continue
        if parts[-2] in MODELS:
            yield MODELS[parts[-2]]
        elif parts[:2] == ["transformers", "models"] and parts[2] in MODELS.values():
            yield parts[2]


def _refuse_foreign(rule: Rule) -> None:
    """Raises: RulesError: there is nothing like this rule's class, or its device, here."""
    path = rule.replace_class
    if path != DEFAULT:
        if not path.startswith(PACKAGE):
            raise rule.error(f"{path} is no operator of kTransformers", "replace")
        row = find_moved(path)
        if row is None:
            raise rule.error(f"{path}: no released rules name it, and nothing is known of it here")
        if row.fate is Fate.REFUSED:
            raise rule.error(f"{path}: {row.advice}", "replace")
    for name in _DEVICES:
        device = rule.kwargs.get(name)
        if device is not None and not _DEVICE.fullmatch(str(device)):
            raise rule.error(f"{name} {device}: only cpu and cuda are known here", f"kwargs.{name}")


def _is_experts(rule: Rule) -> bool:
    row = find_moved(rule.replace_class)
    return row is not None and row.text == _EXPERTS


def _experts_rule(rule: Rule) -> dict[str, Any]:
    """Ours, for the same layers and on the same device."""
    if rule.match_name is None:
        raise rule.error("a rule for experts needs match.name, which says of which layers", "match")
    # Mixtral's block has another name in current transformers.
    name = rule.match_name.replace("block_sparse_moe", "mlp")
    device = _device(rule)
    return {
        "match": {"name": name},
        "replace": {
            "class": _EXPERTS,
            "kwargs": {"prefill_device": device, "generate_device": device},
        },
        "recursive": False,
    }


def _device(rule: Rule) -> str:
    """Where the layer is: experts that stay on the CPU give their output there.

    The defaults are those of kTransformers' classes.
    """
    found = str(rule.kwargs.get("generate_device", "cpu"))
    if found == "cpu":
        found = str(rule.kwargs.get("out_device", "cuda"))
    return "auto" if found == "cuda" else found  # the first GPU; where there is none, the CPU


def _dropped(rule: Rule) -> str:
    names: dict[str, list[str]] = {}
    for name in rule.kwargs:
        if name in KWARGS and name != "out_device":
            names.setdefault(KWARGS[name], []).append(name)
    return "".join(f"; {', '.join(same)} dropped: {why}" for why, same in names.items())


def _fate(rule: Rule) -> str:
    row = find_moved(rule.replace_class)
    if row is None:
        return "dropped: what it places follows its layer's experts"
    name = rule.replace_class.rpartition(".")[2]
    if row.fate is Fate.AUTOMATIC:
        return f"{name} dropped: {row.text}"
    kind = rule.kwargs.get("generate_op")
    note = ""
    if kind == _FP8:
        note = "; FP8 matrices merged into safetensors are not read here: give the GGUF file"
    elif kind in _QUANTISED:
        note = "; dense: quantised, for its matrices in the file's own types"
    return f"{name} becomes {row.text.rpartition('.')[2]}, on its layer's device{note}"


def _with_experts(
    packaged: list[dict[str, Any]], placed: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The family's packaged rules, with these for its experts."""
    written: list[dict[str, Any]] = []
    for rule in packaged:
        if rule["replace"]["class"] != _EXPERTS:
            written.append(copy.deepcopy(rule))
            continue
        policies = rule["replace"]["kwargs"]
        for ours in placed:
            ours["replace"]["kwargs"] = {**policies, **ours["replace"]["kwargs"]}
            written.append(ours)
    return written


def _keep_quantised(rules: list[dict[str, Any]]) -> None:
    """Dense matrices stay as they are in the file, on a GPU too."""
    for rule in rules:
        kwargs = rule["replace"].get("kwargs", {})
        if "dense" in kwargs:
            kwargs["dense"] = "quantised"


def translate_file(path: str) -> Translation:
    """Read a file of kTransformers' rules and write it in our form. Raises as `translate`."""
    return translate(load_rules(path))
