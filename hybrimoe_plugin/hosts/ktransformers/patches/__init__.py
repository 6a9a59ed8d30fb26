"""The patch set: small, reversible changes that let an uncompiled ktransformers run.

Each patch says why it exists and for which versions, and finds out itself whether the host lacks
the real thing; a complete host is left alone. They must be applied before anything imports
`ktransformers`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.hosts.ktransformers.changes import Changes
from hybrimoe_plugin.hosts.ktransformers.patches.base import Patch
from hybrimoe_plugin.hosts.ktransformers.release import (
    VERSION,
    how_to_install,
    in_range,
    installed,
)

__all__ = ["Applied", "Decision", "Patch", "all_patches", "apply_patches", "decide"]


@dataclass(frozen=True)
class Decision:
    """Whether a patch is used here, and why or why not."""

    patch: Patch
    used: bool
    why: str


class Applied:
    """The patches in force; `undo` takes them back, also at the end of a `with` block."""

    def __init__(self, decisions: Sequence[Decision], changes: Changes) -> None:
        self.decisions = tuple(decisions)
        self.changes = changes
        """Further changes made here are taken back with the patches."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(decision.patch.name for decision in self.decisions if decision.used)

    def undo(self) -> None:
        self.changes.undo()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_error: object) -> None:
        self.undo()


def all_patches() -> tuple[Patch, ...]:
    """Every patch, in order: missing modules first, then what imports them."""
    from hybrimoe_plugin.hosts.ktransformers.patches import behaviour, devices, modules

    return (*modules.PATCHES, *devices.PATCHES, *behaviour.PATCHES)


def decide(version: str | None = None, skip: Collection[str] = ()) -> list[Decision]:
    """Which patches this host needs.

    Args:
        version: of ktransformers; default the installed one.
        skip: names of patches to leave out.

    Raises:
        BackendError: ktransformers is not installed.
        ConfigError: `skip` names a patch that does not exist.
    """
    found = version or installed()
    if found is None:
        raise BackendError(
            f"ktransformers {VERSION} is not installed here; this brings it: {how_to_install()}"
        )
    known = [patch.name for patch in all_patches()]
    unknown = sorted(set(skip) - set(known))
    if unknown:
        raise ConfigError(f"unknown patch {', '.join(unknown)}; known: {', '.join(known)}")
    return [_decide(patch, found, skip) for patch in all_patches()]


def _decide(patch: Patch, version: str, skip: Collection[str]) -> Decision:
    if patch.name in skip:
        return Decision(patch, False, "left out on request")
    if not in_range(version, patch.low, patch.below):
        return Decision(patch, False, f"not for version {version}")
    lacking = patch.needed()
    return Decision(patch, lacking is not None, lacking or "the host has the real thing")


def apply_patches(skip: Collection[str] = ()) -> Applied:
    """Apply what this host needs, all or none.

    Raises:
        BackendError, ConfigError: as `decide`; or a patch could not be applied, after which nothing
            is changed.
    """
    decisions = decide(skip=skip)
    changes = Changes()
    name = ""
    try:
        for decision in decisions:
            if decision.used:
                name = decision.patch.name
                decision.patch.apply(changes)
    except BaseException as error:
        changes.undo()
        if not isinstance(error, Exception):
            raise
        raise BackendError(
            f"ktransformers patch {name}: {type(error).__name__}: {error}"
        ) from error
    return Applied(decisions, changes)
