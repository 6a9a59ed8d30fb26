"""Decide which module each rule takes: a dry run on a model without weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hybrimoe_plugin.config import Settings, current_settings
from hybrimoe_plugin.errors import ConfigError, HybriMoEError, RulesError
from hybrimoe_plugin.injection.classes import check_kwargs, import_class, takes_settings
from hybrimoe_plugin.injection.rules import DEFAULT, DEVICE_KEYS, Rule, Rules, find_names

_EXCLUSIVE = (("cache_ratio", "cache_bytes"),)
"""Pairs of settings of which only one may be given: either overrides the other in a rule."""


@dataclass(frozen=True)
class Match:
    """A module that a rule takes."""

    name: str
    """Qualified module name; the operator's key."""
    original: str
    """Class name of the module as it stands in the model."""
    operator: str
    """Dotted path of the operator's class, or `default`: the module stays."""
    rule: Rule
    kwargs: Mapping[str, Any]
    """The rule's kwargs under current names, merged with settings from elsewhere."""
    operator_class: type[nn.Module] | None = field(default=None, repr=False)
    """None for `default`."""
    shadowed: tuple[int, ...] = ()
    """Indices of later rules that match the module too, but come too late."""
    given: tuple[str, ...] = ()
    """Settings among the kwargs that come from the command line or the API, not from the rule."""

    @property
    def device(self) -> str | None:
        """Where the module computes while generating; None: the operator or the host decides."""
        for name in ("generate_device", "prefill_device"):
            if name in self.kwargs:
                device = self.kwargs[name]
                return None if device is None else str(device)
        return None

    @property
    def replaces(self) -> bool:
        return self.operator_class is not None


Declines = Callable[[str, nn.Module, type[nn.Module]], bool]
"""Whether a module, by its qualified name, is not to be replaced by an operator of this class."""


def plan_injection(
    model: nn.Module,
    rules: Rules,
    *,
    trust_rules: bool = False,
    declines: Declines | None = None,
) -> list[Match]:
    """Decide which rule takes which module: the first that matches it. Changes nothing.

    The walk follows kTransformers: parents come before children, and the children of a module
    taken by a rule with `recursive: False` are skipped.

    Args:
        model: any model; on the meta device it costs nothing.
        rules: the parsed rules.
        trust_rules: let rules import classes from any package.
        declines: modules that a rule does not take though it matches; later rules may.

    Returns:
        one match per taken module, in the model's order.

    Raises:
        RulesError: a class cannot be imported or is no operator, its kwargs are wrong, a rule
            matches nothing or only what earlier rules take (unless its operator is used by proof),
            or a rule would replace the whole model.
    """
    names = list(_names(model, ""))
    found_names = find_names(rules.rules, names)
    matchers = []
    for rule, found in zip(rules.rules, found_names, strict=True):
        matchers.append(_Matcher(rule, found, trust_rules, declines))
    plan = list(_walk(model, "", matchers))
    for matcher in matchers:
        if matcher.taken == 0 and not matcher.may_be_idle:
            raise matcher.idle_error(model)
    return plan


def with_settings(plan: Sequence[Match], settings: Mapping[str, Any]) -> list[Match]:
    """The same plan; settings from the command line or the API override the rules' kwargs.

    They reach the operators that validate settings (`check_kwargs`); other operators and `default`
    are unchanged.

    Raises:
        ConfigError: a setting is unknown or has a value that is not allowed. It is the giver's
            error, so the message names no rule.
    """
    given = checked_settings(settings)
    if not given:
        return list(plan)
    return [_with_given(match, given) for match in plan]


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and devices from outside the rules, validated and under their current names.

    Raises:
        ConfigError: as `Settings.of`.
    """
    given = current_settings(settings)
    Settings.of({name: value for name, value in given.items() if name not in DEVICE_KEYS})
    return given


def _with_given(match: Match, given: Mapping[str, Any]) -> Match:
    operator = match.operator_class
    if operator is None or not takes_settings(operator):
        return match
    kwargs = dict(match.kwargs)
    for pair in _EXCLUSIVE:
        if any(given.get(name) is not None for name in pair):
            for name in pair:
                kwargs.pop(name, None)
    kwargs.update(given)
    try:
        operator.check_kwargs(kwargs)  # type: ignore[attr-defined]
    except HybriMoEError as error:
        # The rule's own kwargs have passed this check.
        raise ConfigError(f"{error} (for {match.name})") from None
    return replace(match, kwargs=kwargs, given=tuple(given))


class _Matcher:
    """A rule, its imported classes, and how many modules it has matched."""

    def __init__(
        self,
        rule: Rule,
        names: frozenset[str],
        trust_rules: bool,
        declines: Declines | None,
    ) -> None:
        self.rule = rule
        self.kwargs = rule.kwargs
        self._names = names
        self._declines = declines
        self.matched = 0
        self.taken = 0
        self.declined = 0
        self.taken_by: Rule | None = None
        """The earlier rule that took the first module this one matched."""
        self.match_class: type[nn.Module] | None = None
        self.operator: type[nn.Module] | None = None
        if rule.match_class is not None:
            self.match_class = import_class(rule, rule.match_class, "class", trust_rules)
        if rule.replace_class != DEFAULT:
            self.operator = import_class(rule, rule.replace_class, "replace", trust_rules)
            check_kwargs(rule, self.operator, rule.kwargs)
            if takes_settings(self.operator):
                self.kwargs = current_settings(rule.kwargs)

    def fits(self, module: nn.Module, name: str) -> bool:
        if self.match_class is not None and not isinstance(module, self.match_class):
            return False
        return name in self._names

    @property
    def may_be_idle(self) -> bool:
        """Whether it need not take a module: where it declined some, or is one of several offers.

        An operator that is used by proof is an offer, which modules of an earlier rule do not need.
        """
        return bool(self.declined or (self.matched and getattr(self.operator, "by_proof", False)))

    def leaves(self, module: nn.Module, name: str) -> bool:
        """Whether it leaves a module that it fits as it is."""
        if self.operator is None or self._declines is None:
            return False
        left = self._declines(name, module, self.operator)
        self.declined += left
        return left

    def take(self, module: nn.Module, name: str, shadowed: tuple[int, ...]) -> Match:
        if self.operator is not None and not name:
            raise self.rule.error(
                f"rule {self.rule.index} would replace the whole model; narrow match.name to the "
                "modules you mean"
            )
        self.taken += 1
        return Match(
            name=name,
            original=type(module).__name__,
            operator=self.rule.replace_class,
            rule=self.rule,
            kwargs=copy.deepcopy(dict(self.kwargs)),
            operator_class=self.operator,
            shadowed=shadowed,
        )

    def idle_error(self, model: nn.Module) -> RulesError:
        """Why the rule took no module of the model."""
        part = "name" if self.rule.match_name is not None else "class"
        return self.rule.error(f"rule {self.rule.index} {self._idle_reason(model)}", part)

    def _idle_reason(self, model: nn.Module) -> str:
        if self.taken_by is not None:
            return (
                f"gets no module: earlier rules take all {self.matched} that it matches, the first "
                f"by rule {self.taken_by.index} in line {self.taken_by.line}; put it before that "
                "rule or remove it"
            )
        for name, module in model.named_modules():
            if self.fits(module, name):
                return (
                    "matches only inside modules taken with recursive: False, such as "
                    f"{name!r}; remove it or that recursive: False"
                )
        wanted = []
        if self.rule.match_name is not None:
            wanted.append(f"name {self.rule.match_name!r}")
        if self.rule.match_class is not None:
            wanted.append(f"class {self.rule.match_class!r}")
        return (
            f"matches no module of {type(model).__name__} ({' and '.join(wanted)}); correct match "
            "or remove the rule (hybrimoe explain shows the model's modules)"
        )


def _walk(module: nn.Module, name: str, matchers: Sequence[_Matcher]) -> Iterator[Match]:
    fitting = [matcher for matcher in matchers if matcher.fits(module, name)]
    for matcher in fitting:
        matcher.matched += 1
    while fitting and fitting[0].leaves(module, name):
        del fitting[0]
    if fitting:
        winner, *others = fitting
        for other in others:
            other.taken_by = other.taken_by or winner.rule
        shadowed = tuple(other.rule.index for other in others)
        yield winner.take(module, name, shadowed)
        if not winner.rule.recursive:
            return
    for child_name, child in _children(module, name):
        yield from _walk(child, child_name, matchers)


def _names(module: nn.Module, name: str) -> Iterator[str]:
    """All names that `_walk` can reach."""
    yield name
    for child_name, child in _children(module, name):
        yield from _names(child, child_name)


def _children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children(): it yields a module that two parents share only once.
    for child_name, child in module._modules.items():
        if child is not None:
            full_name = f"{name}.{child_name}" if name else child_name
            yield full_name, child
