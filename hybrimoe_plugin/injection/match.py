"""Decide which module each rule takes: a dry run on a model without weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hybrimoe_plugin.errors import RulesError
from hybrimoe_plugin.injection.classes import check_kwargs, import_class, takes_settings
from hybrimoe_plugin.injection.rules import DEFAULT, Rule, Rules, find_names

_EXCLUSIVE = (("cache_ratio", "cache_bytes"),)
"""Settings of which only one may be given: naming one overrides a rule's other."""


@dataclass(frozen=True)
class Match:
    """One module that a rule takes."""

    name: str
    """Qualified module name; the operator's key."""
    original: str
    """Class name of the module as it stands in the model."""
    operator: str
    """Dotted path of the operator's class, or `default`: the module stays."""
    rule: Rule
    kwargs: Mapping[str, Any]
    """The rule's kwargs, settings from elsewhere merged in."""
    operator_class: type[nn.Module] | None = field(default=None, repr=False)
    """None for `default`."""
    shadowed: tuple[int, ...] = ()
    """Indices of later rules that match the module too and do not get it."""

    @property
    def device(self) -> str | None:
        """Where the module computes while generating; None leaves it to the operator or host."""
        device = self.kwargs.get("generate_device", self.kwargs.get("prefill_device"))
        return None if device is None else str(device)

    @property
    def replaces(self) -> bool:
        return self.operator_class is not None


def plan_injection(model: nn.Module, rules: Rules, *, trust_rules: bool = False) -> list[Match]:
    """Apply rules to a model on paper: the first rule that matches a module takes it.

    The walk follows kTransformers: parents before children, children of a module taken by a rule
    with `recursive: False` are left alone. Nothing is built and the model is not changed.

    Args:
        model: any model; on the meta device it costs nothing.
        rules: the parsed rules.
        trust_rules: let rules import classes from any package.

    Returns:
        one match per taken module, in the model's order.

    Raises:
        RulesError: a class cannot be imported or is no operator, its kwargs are wrong, a rule
            matches nothing or only what earlier rules take, or a rule would replace the whole
            model.
    """
    names = find_names(rules.rules, list(_names(model, "")))
    matchers = [
        _Matcher(rule, found, trust_rules) for rule, found in zip(rules.rules, names, strict=True)
    ]
    plan = list(_walk(model, "", matchers))
    for matcher in matchers:
        if matcher.taken == 0:
            raise matcher.idle_error(model)
    return plan


def with_settings(plan: Sequence[Match], settings: Mapping[str, Any]) -> list[Match]:
    """The same plan with settings from the command line or API laid over the rules' kwargs.

    They reach the operators that validate settings (`check_kwargs`); other operators and `default`
    are unchanged.

    Raises:
        RulesError: an operator refuses a value.
    """
    dropped = {
        b if given == a else a
        for a, b in _EXCLUSIVE
        for given in (a, b)
        if settings.get(given) is not None
    }
    merged = []
    for match in plan:
        if match.operator_class is not None and settings and takes_settings(match.operator_class):
            kept = {key: value for key, value in match.kwargs.items() if key not in dropped}
            match = replace(match, kwargs={**kept, **settings})
            check_kwargs(match.rule, match.operator_class, match.kwargs)  # type: ignore[arg-type]
        merged.append(match)
    return merged


class _Matcher:
    """A rule with its classes imported, and how often it matched."""

    def __init__(self, rule: Rule, names: frozenset[str], trust_rules: bool) -> None:
        self.rule = rule
        self._names = names
        self.matched = 0
        self.taken = 0
        self.taken_by: Rule | None = None
        self.match_class: type[nn.Module] | None = None
        self.operator: type[nn.Module] | None = None
        if rule.match_class is not None:
            self.match_class = import_class(rule, rule.match_class, "class", trust_rules)
        if rule.replace_class != DEFAULT:
            self.operator = import_class(rule, rule.replace_class, "replace", trust_rules)
            check_kwargs(rule, self.operator, rule.kwargs)

    def fits(self, module: nn.Module, name: str) -> bool:
        if self.match_class is not None and not isinstance(module, self.match_class):
            return False
        return name in self._names

    def take(self, module: nn.Module, name: str, shadowed: tuple[int, ...]) -> Match:
        if self.operator is not None and not name:
            raise self.rule.error(
                f"rule {self.rule.index} would replace the whole model; narrow match.name to the "
                f"modules you mean"
            )
        self.taken += 1
        kwargs = copy.deepcopy(dict(self.rule.kwargs))
        path = self.rule.replace_class
        return Match(name, type(module).__name__, path, self.rule, kwargs, self.operator, shadowed)

    def idle_error(self, model: nn.Module) -> RulesError:
        """Why the rule took no module of the model."""
        rule, what = self.rule, type(model).__name__
        part = "name" if rule.match_name is not None else "class"
        if self.taken_by is not None:
            earlier = f"rule {self.taken_by.index} in line {self.taken_by.line}"
            return rule.error(
                f"rule {rule.index} gets no module: earlier rules take all {self.matched} that it "
                f"matches, "
                f"the first by {earlier}; put it before that rule or remove it",
                part,
            )
        unreached = next(
            (name for name, module in model.named_modules() if self.fits(module, name)), None
        )
        if unreached is not None:
            return rule.error(
                f"rule {rule.index} matches only inside modules taken with recursive: False, such "
                f"as "
                f"{unreached!r}; remove it or that recursive: False",
                part,
            )
        wanted = " and ".join(
            f"{label} {value!r}"
            for label, value in (("name", rule.match_name), ("class", rule.match_class))
            if value is not None
        )
        return rule.error(
            f"rule {rule.index} matches no module of {what} ({wanted}); correct match or remove "
            f"the rule "
            f"(hybrimoe explain shows the model's modules)",
            part,
        )


def _walk(module: nn.Module, name: str, matchers: Sequence[_Matcher]) -> Iterator[Match]:
    fitting = [matcher for matcher in matchers if matcher.fits(module, name)]
    for matcher in fitting:
        matcher.matched += 1
    if fitting:
        winner, *others = fitting
        for other in others:
            other.taken_by = other.taken_by or winner.rule
        yield winner.take(module, name, tuple(other.rule.index for other in others))
        if not winner.rule.recursive:
            return
    for child_name, child in _children(module, name):
        yield from _walk(child, child_name, matchers)


def _names(module: nn.Module, name: str) -> Iterator[str]:
    """All names that `_walk` may come to."""
    yield name
    for child_name, child in _children(module, name):
        yield from _names(child, child_name)


def _children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children(): it shows a module that two parents share only once.
    for child_name, child in module._modules.items():
        if child is not None:
            yield f"{name}.{child_name}" if name else child_name, child
