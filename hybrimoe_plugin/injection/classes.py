"""Import the classes that rules name, and check a rule's kwargs against its operator before
anything is built.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.injection.moved import current_path
from hybrimoe_plugin.injection.rules import RESERVED, TRUSTED, Rule, is_trusted
from hybrimoe_plugin.injection.yaml_nodes import shorten, suggest


def import_class(rule: Rule, path: str, part: str, trust_rules: bool = False) -> type[nn.Module]:
    """Import the `nn.Module` class that a part of a rule names.

    Args:
        rule: the rule, for the error's place.
        path: dotted path of the class.
        part: `class` or `replace`, the part of the rule that holds the path.
        trust_rules: import from any package.

    Raises:
        RulesError: the package is not among `TRUSTED`, it cannot be imported, or the path is not a
            module class.
    """
    if not trust_rules and not is_trusted(path):
        raise rule.error(
            f"{shorten(path)} is outside the packages that rules may import "
            f"({', '.join(TRUSTED)}); "
            "give --trust_rules (trust_rules=True) if you trust this file",
            part,
        )
    module_name, _, name = current_path(path).rpartition(".")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, name)
    except AttributeError as error:
        names = [key for key, value in vars(module).items() if inspect.isclass(value)]
        near = suggest(name, names) if names else ""
        raise rule.error(
            f"module {module_name} has no class {name!r}{near if 'mean' in near else ''}", part
        ) from error
    except Exception as error:
        # Importing runs foreign code, which may raise anything.
        raise rule.error(
            f"cannot import {module_name}: {type(error).__name__}: {_one_line(error)}", part
        ) from error
    if not inspect.isclass(found) or not issubclass(found, nn.Module):
        raise rule.error(
            f"{path} is not a torch.nn.Module class, found {type(found).__name__}", part
        )
    return found


def check_kwargs(rule: Rule, operator: type[nn.Module], kwargs: Mapping[str, Any]) -> None:
    """Check kwargs against an operator's own `check_kwargs`, or else against its constructor's
    signature.

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
        named = next((key for key in kwargs if key in text), "")
        raise rule.error(f"kwargs of rule {rule.index}: {text}", f"kwargs.{named}") from error


def takes_settings(operator: type[nn.Module]) -> bool:
    """Whether engine settings may be merged into an operator's kwargs: it checks them itself."""
    return hasattr(operator, "check_kwargs")


def _check_signature(rule: Rule, operator: type[nn.Module], kwargs: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(operator).parameters
    except (TypeError, ValueError):
        return
    kinds = inspect.Parameter
    named = [
        p
        for p in parameters.values()
        if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    ]
    open_ended = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    missing_contract = [name for name in RESERVED if name not in parameters]
    if missing_contract and not open_ended:
        raise rule.error(
            f"{rule.replace_class} is no operator: its constructor does not take "
            f"{', '.join(missing_contract)}",
            "replace",
        )
    own = [p.name for p in named if p.name not in RESERVED]
    for name in kwargs:
        if not open_ended and name not in own:
            hint = suggest(name, own) if own else "; it takes none"
            raise rule.error(
                f"{rule.replace_class} takes no argument {shorten(name)}{hint}", f"kwargs.{name}"
            )
    missing = [
        p.name for p in named if p.default is kinds.empty and p.name not in (*RESERVED, *kwargs)
    ]
    if missing:
        raise rule.error(f"{rule.replace_class} needs kwargs {', '.join(missing)}", "replace")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
