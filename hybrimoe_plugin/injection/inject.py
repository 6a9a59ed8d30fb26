"""Put operators in place of modules, all or none, and take them out again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.errors import HybriMoEError, RulesError
from hybrimoe_plugin.injection.match import Match

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replacement:
    """One module that was replaced, and where."""

    name: str
    parent: nn.Module
    attribute: str
    original: nn.Module
    operator: nn.Module


class Injection:
    """What an injection changed in a model; `restore` undoes it.

    Only the parents' entries for the replaced modules are ever changed: no hook, no attribute, no
    class.
    """

    def __init__(self, plan: Sequence[Match]) -> None:
        self.plan = tuple(plan)
        self._replaced: list[Replacement] = []

    @property
    def replaced(self) -> tuple[Replacement, ...]:
        """The replacements in force, in the order in which they were made."""
        return tuple(self._replaced)

    @property
    def devices(self) -> dict[str, str]:
        """Qualified module name -> device, for the modules that a `default` rule keeps and
        places.
        """
        return {
            match.name: match.device
            for match in self.plan
            if not match.replaces and match.device is not None
        }

    def restore(self) -> None:
        """Put every original module back; a second call does nothing.

        Raises:
            RulesError: something else has replaced an operator since; nothing is changed then.

        Mutates: the model.
        """
        for done in self._replaced:
            if done.parent._modules.get(done.attribute) is not done.operator:
                raise RulesError(
                    f"{done.name} was replaced again after this injection; undo that first"
                )
        self._undo()

    def _replace(self, done: Replacement) -> None:
        # Recorded first: an interrupt between the two lines must not leave an operator behind.
        self._replaced.append(done)
        done.parent.register_module(done.attribute, done.operator)

    def _undo(self) -> None:
        while self._replaced:
            done = self._replaced[-1]
            done.parent.register_module(done.attribute, done.original)
            self._replaced.pop()


def inject(model: nn.Module, plan: Sequence[Match], gguf_loader: Any, config: Any) -> Injection:
    """Build the plan's operators on the meta device and set them in the model; `load()` is the
    host's next step.

    Args:
        model: the model that the plan was made for.
        plan: from `plan_injection`.
        gguf_loader: the open weights, handed to every operator.
        config: the model's configuration, handed to every operator.

    Returns:
        the injection, which can be restored.

    Raises:
        RulesError: an operator could not be built, or the plan is another model's. Errors of this
            project's own kinds keep their type. The model is as before in every case, an interrupt
            included.

    Mutates: `model`.
    """
    injection = Injection(plan)
    # Found before anything changes: a module inside a replaced one is reached through the original.
    places = [(match, *_place(model, match)) for match in plan if match.replaces]
    try:
        for match, parent, original in places:
            operator = _build(match, original, gguf_loader, config)
            injection._replace(
                Replacement(match.name, parent, match.name.rpartition(".")[2], original, operator)
            )
    except BaseException:
        injection._undo()
        raise
    logger.info("injected %d operators", len(injection.replaced))
    return injection


def _place(model: nn.Module, match: Match) -> tuple[nn.Module, nn.Module]:
    """The parent of a match's module, and the module."""
    parent_name, _, attribute = match.name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        return parent, parent.get_submodule(attribute)
    except AttributeError as error:
        raise match.rule.error(
            f"the model has no module {match.name!r}; was the plan made for another one?"
        ) from error


def _build(match: Match, original: nn.Module, gguf_loader: Any, config: Any) -> nn.Module:
    assert match.operator_class is not None
    where = f"{match.name}: {match.operator}"
    try:
        with torch.device("meta"):
            return match.operator_class(
                key=match.name,
                gguf_loader=gguf_loader,
                config=config,
                orig_module=original,
                **copy.deepcopy(dict(match.kwargs)),
            )
    except HybriMoEError as error:
        raise type(error)(str(match.rule.error(f"{where}: {error}", "replace"))) from error
    except Exception as error:
        # An operator may be anybody's class and raise anything.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise match.rule.error(f"{where} could not be built: {reason}", "replace") from error
