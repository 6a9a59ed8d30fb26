"""Import the classes that rules name, and check kwargs before any operator is built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from torch import nn

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.injection.ktransformers_classes import KWARGS, PACKAGE, advice_on, find_moved
from hybrimoe_plugin.injection.moved import current_path
from hybrimoe_plugin.injection.rules import DEFAULT, RESERVED, TRUSTED, Rule, Rules, is_trusted
from hybrimoe_plugin.injection.yaml_nodes import shorten, suggest

_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
"""Kinds of parameters that can be given by name."""


def import_class(rule: Rule, path: str, part: str, trust_rules: bool = False) -> type[nn.Module]:
    """Import the `nn.Module` class that a part of a rule names.

    Args:
        rule: the rule, so that errors name its file and line.
        path: dotted path of the class.
        part: `class` or `replace`, the part of the rule that holds the path.
        trust_rules: whether to import from any package.

    Raises:
        RulesError: the package is not among `TRUSTED`, it cannot be imported, or the path is not a
            module class.
    """
    if not trust_rules and not is_trusted(path):
        packages = ", ".join(TRUSTED)
        raise rule.error(
            f"{shorten(path)} is outside the packages that rules may import ({packages}); "
            "give --trust_rules (trust_rules=True) if you trust this file",
            part,
        )
    module_name, _, name = current_path(path).rpartition(".")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, name)
    except AttributeError as error:
        names = [key for key, value in vars(module).items() if inspect.isclass(value)]
        hint = suggest(name, names)
        if "mean" not in hint:
            hint = ""  # not a list of everything the module has
        moved = find_moved(path)
        if moved is not None:
            hint = (
                f"; kTransformers has it since {moved.since} (hybrimoe translate_rules "
                f"{rule.source} writes the rules for local_chat)"
            )
        raise rule.error(f"module {module_name} has no class {name!r}{hint}", part) from error
    except Exception as error:
        # Importing runs foreign code, which may raise anything.
        # The fate of the whole rule says more than where the class to match is now.
        advice = advice_on(rule.replace_class) or advice_on(path)
        if advice is not None and path.startswith(PACKAGE):
            raise rule.error(
                f"{path} is a class of kTransformers, which cannot be imported here; in rules for "
                f"local_chat, {advice} (hybrimoe translate_rules {rule.source} writes them)",
                part,
            ) from error
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise rule.error(f"cannot import {module_name}: {reason}", part) from error
    if not inspect.isclass(found) or not issubclass(found, nn.Module):
        kind = type(found).__name__
        raise rule.error(f"{path} is not a torch.nn.Module class, found {kind}", part)
    return found


def import_classes(rules: Rules) -> None:
    """Import every class that rules name, from any package: the host does so in any case.

    Raises:
        RulesError: a class cannot be imported, or is no module class.
    """
    for rule in rules.rules:
        if rule.match_class is not None:
            import_class(rule, rule.match_class, "class", trust_rules=True)
        if rule.replace_class != DEFAULT:
            import_class(rule, rule.replace_class, "replace", trust_rules=True)


def check_kwargs(rule: Rule, operator: type[nn.Module], kwargs: Mapping[str, Any]) -> None:
    """Check kwargs by an operator's `check_kwargs`, or else by its constructor's signature.

    Raises:
        RulesError: an unknown or missing argument, or a value that the operator refuses.
    """
    own = getattr(operator, "check_kwargs", None)
    if own is None:
        _check_signature(rule, operator, kwargs)
        return
    try:
        own(kwargs)
    except HybriMoEError as error:
        text = str(error)
        theirs = [
            f"; {key} is kTransformers': {KWARGS[key]}"
            for key in kwargs
            if key in KWARGS and key in text
        ]
        part = _part_named(text, kwargs)
        raise rule.error(f"kwargs of rule {rule.index}: {text}{''.join(theirs)}", part) from None


def _part_named(message: str, kwargs: Mapping[str, Any]) -> str:
    """The part of a rule that a message is about: the kwarg that it names first."""
    named = [key for key in kwargs if key in message]
    if not named:
        return "kwargs"
    # One name may begin with another: the longer one is meant.
    first = min(named, key=lambda key: (message.index(key), -len(key)))
    return f"kwargs.{first}"


def takes_settings(operator: type[nn.Module]) -> bool:
    """Whether engine settings may be merged into an operator's kwargs: it must check them."""
    return hasattr(operator, "check_kwargs")


def _check_signature(rule: Rule, operator: type[nn.Module], kwargs: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(operator).parameters
    except (TypeError, ValueError):
        return
    open_ended = False
    optional = []
    needed = []
    for parameter in parameters.values():
        if parameter.kind is Parameter.VAR_KEYWORD:
            open_ended = True
        if parameter.kind not in _BY_NAME or parameter.name in RESERVED:
            continue
        if parameter.default is Parameter.empty:
            needed.append(parameter.name)
        else:
            optional.append(parameter.name)

    name = rule.replace_class
    reserved = [each for each in RESERVED if each not in parameters]
    if reserved and not open_ended:
        missing = ", ".join(reserved)
        raise rule.error(
            f"{name} is no operator: its constructor does not take {missing}", "replace"
        )
    known = needed + optional
    unknown = [each for each in kwargs if each not in known]
    if unknown and not open_ended:
        first = unknown[0]
        hint = suggest(first, known) if known else "; it takes none"
        raise rule.error(f"{name} takes no argument {shorten(first)}{hint}", f"kwargs.{first}")
    absent = [each for each in needed if each not in kwargs]
    if absent:
        raise rule.error(f"{name} needs kwargs {', '.join(absent)}", "replace")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
