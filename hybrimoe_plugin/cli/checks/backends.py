"""Which packages are installed, and which backends work."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from hybrimoe_plugin import __version__, extras
from hybrimoe_plugin.cli.checks.check import Check
from hybrimoe_plugin.cli.serve import libraries

PACKAGES = ("torch", "transformers", "gguf", "numpy", "psutil", "triton", "flashinfer-python")
_TRY_SECONDS = 60


def installed() -> list[Check]:
    """Versions of this package, of Python and of the packages that matter."""
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    checks = [Check("hybrimoe", True, __version__), Check("python", True, python)]
    checks += [_version(name, "not installed") for name in PACKAGES]
    for extra in extras.EXTRAS:
        checks.append(_version(extra.name, f"not installed: {extra.remedy()}"))
    return checks


def _version(name: str, missing: str) -> Check:
    try:
        return Check(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, False, missing)


def kt_kernel() -> Check:
    """Whether kt-kernel loads on this processor."""
    return _native(
        "CPU experts by kt-kernel",
        "from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel as f; m = f(); "
        "print(getattr(m, '__file__', m))",
    )


def ggml() -> Check:
    """Whether the ggml library in kt-kernel loads and computes."""
    return _native(
        "CPU experts by ggml",
        "from hybrimoe_plugin.compute.cpu.ggml import Ggml; Ggml(); print('in kt-kernel')",
    )


def operations() -> Check:
    """Whether the CPU's operations were compiled, and what multiplies many rows in them."""
    from hybrimoe_plugin.compute.cpu.native import kernels

    name = "CPU operations in C"
    if not kernels.compiled():
        why = "not compiled" if kernels.operations is None else "compiled from older sources"
        return Check(
            name,
            False,
            f"{why}; optional: ggml's graphs do the same, slower. With a C compiler here, "
            "install this package again",
        )
    tiles = kernels.TILES[kernels.operations.tiles]
    return Check(name, True, f"compiled at installation; products of many rows by {tiles}")


def server() -> Check:
    """Whether `hybrimoe serve` has its libraries."""
    absent = libraries.missing()
    if absent:
        return Check("server", False, f"{', '.join(absent)} not installed: {libraries.REMEDY}")
    return Check("server", True, ", ".join(libraries.LIBRARIES))


def _native(name: str, code: str) -> Check:
    """Try native code in a process of its own.

    On a processor that it was not built for, it ends the process.
    """
    try:
        done = _try(code)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name, False, f"could not be tried: {error}")
    last = _last_line(done.stdout if done.returncode == 0 else done.stderr)
    if done.returncode == 0:
        return Check(name, True, Path(last).name or "loads")
    # A typed error already says what to do.
    reason = last.rpartition("BackendError: ")[2]
    return Check(name, False, reason or f"the process ended with {done.returncode}")


def torch_cpu() -> Check:
    import torch

    threads = torch.get_num_threads()
    return Check("CPU experts by torch", True, f"reference, slow; {threads} thread(s)")


def cuda() -> Check:
    from hybrimoe_plugin.device.machine import cuda_refusal

    refusal = cuda_refusal()
    if refusal is not None:
        return Check("accelerator cuda", False, refusal)
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("accelerator cuda", True, ", ".join(names))


def triton() -> Check:
    import torch

    try:
        import triton
    except ImportError:
        return Check("triton kernels", False, "not installed; a torch with CUDA brings it")
    version = f"triton {triton.__version__}"
    if not torch.cuda.is_available():
        return Check("triton kernels", False, f"{version}, but no CUDA device")
    return Check("triton kernels", True, version)


def flashinfer() -> Check:
    """Whether flashinfer may compute attention of decode steps on a GPU."""
    import torch

    name = "attention by flashinfer"
    try:
        version = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        return Check(
            name, False, "not installed; optional: torch computes attention without flashinfer"
        )
    if not torch.cuda.is_available():
        return Check(name, False, f"flashinfer {version}, but no CUDA device")
    return Check(name, True, f"flashinfer {version}, used where it is right and faster")


def cache_learning() -> Check:
    """Whether the default cache learns from a token in C or, which takes longer, in numpy."""
    from hybrimoe_plugin.policy.cache import adaptive

    name = "cache learning in C"
    if adaptive.learn_token is not None:
        return Check(name, True, "compiled at installation")
    found = importlib.util.find_spec("hybrimoe_plugin.policy.cache.one_token") is not None
    return Check(
        name,
        False,
        f"{'compiled from other sources' if found else 'not compiled'}; optional: numpy does the "
        "same, some 20 µs a layer slower. With a C compiler here, install this package again",
    )


def emulated() -> Check:
    return Check(
        "accelerator emulated", True, "runs anywhere; all its numbers are labelled emulated"
    )


def ktransformers() -> Check:
    """Whether the classic `ktransformers.local_chat` can be imported with our patches."""
    from hybrimoe_plugin.hosts.ktransformers.release import VERSION, how_to_install
    from hybrimoe_plugin.hosts.ktransformers.release import installed as installed_version

    name = "local_chat"
    found = installed_version()
    if found is None:
        return Check(
            name,
            None,
            f"not installed here; it needs an environment of its own ({how_to_install()})",
        )
    # In a process of its own: the patches and the import must not affect this one.
    code = (
        "from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches; apply_patches()\n"
        "import ktransformers.local_chat, hybrimoe_plugin.hosts.ktransformers.blocks"
    )
    done = _try(code)
    if done.returncode:
        return Check(name, False, f"version {found}: {_last_line(done.stderr)}")
    tested = "" if found == VERSION else f", tested with {VERSION}"
    return Check(name, True, f"version {found}{tested}")


def patches() -> Check:
    """The patches that `ktransformers.local_chat` needs here."""
    from hybrimoe_plugin.hosts.ktransformers.patches import decide
    from hybrimoe_plugin.hosts.ktransformers.release import installed as installed_version

    if installed_version() is None:
        return Check("patches", None, "none without it")
    used = [decision.patch.name for decision in decide() if decision.used]
    names = ", ".join(used)
    return Check("patches", None, f"{names} (hybrimoe patches lists the reasons)")


def _try(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in another process."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=_TRY_SECONDS)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
