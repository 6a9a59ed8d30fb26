"""What is kept on disk between runs."""

from __future__ import annotations

from pathlib import Path

from hybrimoe_plugin.cache_folder import cache_dir, unusable
from hybrimoe_plugin.cli.checks.check import Check
from hybrimoe_plugin.errors import ProfileError
from hybrimoe_plugin.files import human
from hybrimoe_plugin.kept_files import kept_files


def cache_folder() -> Check:
    folder = cache_dir()
    reason = unusable(folder)
    if reason is not None:
        return Check("cache folder", False, f"{reason}: set HYBRIMOE_CACHE to one that can")
    size = human(sum(file.nbytes for file in kept_files()))
    return Check(
        "cache folder",
        None,
        f"{folder} (HYBRIMOE_CACHE names another): {size}, `hybrimoe cache` lists them",
    )


def profiles() -> Check:
    from hybrimoe_plugin.device.machine import hardware

    name = "machine profiles"
    folder = cache_dir() / "profiles"
    machines = [_machine_of(path) for path in sorted(folder.glob("*.json"))]
    if not machines:
        return Check(name, None, "none yet: measured on first use")
    here = machines.count(hardware())
    damaged = machines.count(None)
    others = len(machines) - here - damaged
    detail = f"{here} of this machine, {others} of others in {folder}"
    if damaged:
        return Check(name, False, f"{detail}; {damaged} damaged, measured again on use")
    return Check(name, None, detail)


def _machine_of(profile: Path) -> dict[str, str] | None:
    """The hardware that a stored profile names; None for a damaged profile."""
    from hybrimoe_plugin.replay.profile_files import load_profile

    try:
        return dict(load_profile(profile).hardware)
    except ProfileError:
        return None
