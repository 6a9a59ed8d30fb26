"""Keep machine profiles: measure once for each hardware, backend and expert shape."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from hybrimoe_plugin.cache_folder import cache_dir, write_atomic
from hybrimoe_plugin.compute.backends import CPUBackend
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.device.machine import hardware, versions
from hybrimoe_plugin.device.noise import Noise
from hybrimoe_plugin.engine.calibrate import calibrate
from hybrimoe_plugin.engine.threads import thread_candidates
from hybrimoe_plugin.errors import ProfileError
from hybrimoe_plugin.policy.profile import MachineProfile
from hybrimoe_plugin.replay.profile_files import load_profile
from hybrimoe_plugin.weights.layer_weights import LayerWeights

log = logging.getLogger(__name__)


def ensure_profile(
    weights: LayerWeights,
    backend: str,
    make_cpu: Callable[[int], CPUBackend],
    accelerator: SlotAccelerator | None,
    *,
    threads: int | None = None,
    progress: bool = True,
    refresh: bool = False,
) -> MachineProfile:
    """The stored profile, or a new one where none fits.

    A damaged profile is measured again, with a notice. What was measured while other programs used
    the cores is for this run alone: the next one measures again. `HYBRIMOE_BUSY=keep` stores it
    anyway, for machines that are never quiet.

    Args:
        weights: the experts to measure with.
        backend: name of the CPU backend that `make_cpu` makes for a number of threads.
        threads: None to try several numbers.
        progress: show a bar while measuring.
        refresh: measure even if there is a stored profile.
    """
    kind = "none" if accelerator is None else accelerator.name
    path = profile_path(weights.spec, backend, kind, threads)
    if not refresh:
        stored = _stored(path, weights.spec, threads, accelerator is not None)
        if stored is not None:
            return stored
    noise = Noise()
    measured = calibrate(
        weights, make_cpu, accelerator, threads=threads, progress=progress, median=noise.median
    )
    text = measured.to_json()
    disturbed = noise.verdict()
    if disturbed and os.environ.get("HYBRIMOE_BUSY") != "keep":
        # Where the CPU computes alone, times decide nothing: they matter to who asks for them.
        matters = accelerator is not None or refresh
        level = logging.WARNING if matters else logging.INFO
        log.log(level, "%s: it is measured again at the next start", disturbed)
    else:
        _write(path, text)
    # As every later run will read it.
    return MachineProfile.from_json(text)


def profile_path(spec: ExpertSpec, backend: str, accelerator: str, threads: int | None) -> Path:
    """A file whose name changes with everything that the measurement depends on."""
    facts = [hardware(), versions(), asdict(spec), backend, accelerator, threads]
    text = json.dumps(facts, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    folder = os.environ.get("HYBRIMOE_PROFILES") or cache_dir() / "profiles"
    return Path(folder) / f"{digest[:20]}.json"


def _stored(
    path: Path, spec: ExpertSpec, threads: int | None, accelerated: bool
) -> MachineProfile | None:
    """The stored profile; None where there is none.

    None too, with a notice, where it is damaged or was not measured for this.
    """
    if not os.path.exists(path):  # not Path.exists, which raises where a folder cannot be searched
        return None
    try:
        profile = load_profile(path)
        _check(profile, path, spec, threads, accelerated)
    except ProfileError as error:
        log.warning("%s; measuring again", error)
        return None
    return profile


def _check(
    profile: MachineProfile, path: Path, spec: ExpertSpec, threads: int | None, accelerated: bool
) -> None:
    """Raises: ProfileError: the profile was not measured for these experts and devices."""
    if profile.spec != spec or (profile.accelerator is not None) != accelerated:
        raise ProfileError(f"{path}: the profile of other experts or of another device")
    most = max(thread_candidates()) if threads is None else threads
    found = profile.cpu.threads
    if not 1 <= (found or 1) <= most:
        raise ProfileError(f"{path}: made for {found} threads where {most} are possible")


def _write(path: Path, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        log.warning(
            "%s cannot be written (%s); the machine is measured again next time",
            path,
            error.strerror or error,
        )
