"""The first half of loading, in which no weight is read: files, config, rules and their plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrimoe_plugin.errors import ConfigError, RulesError
from hybrimoe_plugin.families.packaged_rules import ANY, other_family, rules_path
from hybrimoe_plugin.families.registry import names_of
from hybrimoe_plugin.hosts.transformers.checkpoint.files import is_checkpoint
from hybrimoe_plugin.hosts.transformers.checkpoint.open import open_checkpoint
from hybrimoe_plugin.hosts.transformers.complete import check_complete
from hybrimoe_plugin.hosts.transformers.config import has_config, model_config
from hybrimoe_plugin.hosts.transformers.preparation.accelerators import as_if_there
from hybrimoe_plugin.hosts.transformers.skeleton import dtype_of, meta_model
from hybrimoe_plugin.hosts.transformers.stored import keeps_stored, without_foreign, without_plain
from hybrimoe_plugin.injection.inject import Injection, inject
from hybrimoe_plugin.injection.match import Match, plan_injection, with_settings
from hybrimoe_plugin.injection.rules import Rules, load_rules
from hybrimoe_plugin.operators.proof.proofs import Proofs
from hybrimoe_plugin.weights.gguf_store import GGUFStore


@dataclass(frozen=True)
class Prepared:
    """A model on the meta device, and what its rules will do to it."""

    store: GGUFStore | None
    """The open weights; None where only a config.json was given."""
    config: Any
    model: Any
    rules: Rules
    planned: tuple[Match, ...]
    """Every module that a rule takes."""
    plan: tuple[Match, ...]
    """The same without those that `dense: plain` leaves as they are (see `as_if_there` too)."""

    def inject(self) -> Injection:
        """Put the operators into the model. Raises: as `injection.inject`. Mutates: the model."""
        return inject(self.model, self.plan, self.store, self.config)


def prepare(
    model_path: str | Path | None,
    store: GGUFStore | None,
    rules: str | Path | None,
    *,
    dtype: torch.dtype | str | None = None,
    trust_rules: bool = False,
    settings: Mapping[str, Any],
) -> Prepared:
    """Build the model without weights and plan its injection.

    Args:
        model_path, rules, dtype, trust_rules, settings: as in `load_model`.
        store: the open weights, or None for a plan from config.json alone.

    Raises:
        HybriMoEError: as `load_model`.
    """
    config = model_config(model_path, store)
    model = meta_model(config, dtype_of(dtype))
    if store is not None:
        check_complete(model, store, config)
    path = rules_path(rules, config)
    parsed = load_rules(path)
    proofs = Proofs(model, config)
    try:
        plan = plan_injection(model, parsed, trust_rules=trust_rules, declines=proofs.declines)
    except RulesError as error:
        if not any(name.endswith(".experts") for name, _ in model.named_modules()):
            raise RulesError(
                f"{type(model).__name__} has no layers with routed experts in a module of that "
                "name, as transformers' mixture-of-experts families have"
            ) from None
        reason = other_family(parsed, config.model_type)
        if not reason:
            raise
        raise RulesError(f"{error}{reason}") from None
    # The rules for any family offer all operators, and most families do without some.
    proofs.report(logging.INFO if path.name == ANY else logging.WARNING)
    planned = with_settings(plan, settings)
    names = names_of(config.model_type)
    plan = as_if_there(without_foreign(without_plain(planned), store, names))
    if dtype is None and store is not None and any(keeps_stored(match, store) for match in plan):
        # No large tensor is left in the model's own type, and small CPU operations are quickest in
        # float32.
        model.to(torch.float32)
    return Prepared(store, config, model, parsed, tuple(planned), tuple(plan))


def plan_for(
    model_path: str | Path | None,
    gguf_path: str | Path | None,
    rules: str | Path | None = None,
    *,
    trust_rules: bool = False,
    **settings: Any,
) -> Prepared:
    """A dry run, for which a config.json without weights is enough. Raises as `load_model`."""
    store = find_weights(model_path, gguf_path)
    return prepare(model_path, store, rules, trust_rules=trust_rules, settings=settings)


def open_weights(model_path: str | Path | None, gguf_path: str | Path | None) -> GGUFStore:
    """The weights that are named. Raises: ConfigError: none are; WeightsError: as the store."""
    path = gguf_path if gguf_path is not None else model_path
    if path is None:
        raise ConfigError("name the weights: gguf_path, or a model_path that holds them")
    if is_checkpoint(path):
        return open_checkpoint(path)
    return GGUFStore.open(path)


def find_weights(model_path: str | Path | None, gguf_path: str | Path | None) -> GGUFStore | None:
    """The same for a dry run; None where there is only a config.json."""
    if gguf_path is None and has_config(model_path):
        assert model_path is not None
        if not any(Path(model_path).glob("*.gguf")) and not is_checkpoint(model_path):
            return None
    return open_weights(model_path, gguf_path)
