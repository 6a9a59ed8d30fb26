"""Replace modules by operators, all or none of them, and put the modules back."""

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
    """A module that was replaced, and its place in the model."""

    name: str
    parent: nn.Module
    attribute: str
    original: nn.Module
    operator: nn.Module


class Injection:
    """What an injection changed in a model; `restore` undoes it.

    Only the parents' entries for the replaced modules change: no hook, attribute or class does.
    """

    def __init__(self, plan: Sequence[Match]) -> None:
        self.plan = tuple(plan)
        self._replaced: list[Replacement] = []

    @property
    def replaced(self) -> tuple[Replacement, ...]:
        """The replacements in force, in the order they were made."""
        return tuple(self._replaced)

    @property
    def devices(self) -> dict[str, str]:
        """Qualified module name -> device, for modules that `default` rules keep and place."""
        placed = {}
        for match in self.plan:
            if not match.replaces and match.device is not None:
                placed[match.name] = match.device
        return placed

    def restore(self) -> None:
        """Put every original module back; a second call does nothing.

        Raises:
            RulesError: something else has replaced an operator since; nothing is changed.

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
    """Build the plan's operators on the meta device and put them into the model.

    The host then calls `load()` of each operator.

    Args:
        model: the model that the plan was made for.
        plan: from `plan_injection`.
        gguf_loader: the open weights, handed to every operator.
        config: the model's configuration, handed to every operator.

    Returns:
        the injection, which can be restored.

    Raises:
        RulesError: an operator could not be built, or the plan is another model's. An operator's
            own HybriMoEError keeps its type. The model is unchanged in every case, even after an
            interrupt.

    Mutates: `model`.
    """
    injection = Injection(plan)
    # Looked up before anything changes: the path to a module inside a replaced one leads through
    # the original.
    places = [(match, *_place(model, match)) for match in plan if match.replaces]
    try:
        for match, parent, original in places:
            operator = _build(match, original, gguf_loader, config)
            attribute = match.name.rpartition(".")[2]
            done = Replacement(match.name, parent, attribute, original, operator)
            injection._replace(done)
    except BaseException:
        injection._undo()
        raise
    logger.info("injected %d operators", len(injection.replaced))
    return injection


def _place(model: nn.Module, match: Match) -> tuple[nn.Module, nn.Module]:
    """(parent of a match's module, the module)."""
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
        raise type(error)(str(match.rule.error(f"{where}: {error}", "replace"))) from None
    except Exception as error:
        # Operators of other packages may raise anything.
        words = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {words[:300]}"
        raise match.rule.error(f"{where} could not be built: {reason}", "replace") from error
