"""Load kt-kernel's extension module, and say which weight types its build computes."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.extras import KERNELS

KERNEL_TYPES = frozenset(
    {"Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16"}
)
"""GGML types that kt-kernel's MoE computes as a float32 reference does.

IQ4_XS goes through tiles that overflow 16 bits, in every build: 6 to 8 % of an expert's output.
Other types end the process.
"""

BF16_VARIANTS = frozenset({"avx512_bf16", "amx"})
"""kt-kernel's builds that multiply bfloat16.

The others take BF16 weights and then end the process at the first token ("llamafile not
supported").
"""

_STDOUT = threading.RLock()
"""Held while standard output is redirected.

The process has one: of two threads that both redirect it, the second would restore the first
one's sink.
"""


def import_kernel() -> ModuleType:
    """kt-kernel's extension module.

    Raises:
        BackendError: not installed, or it does not load on this processor.
    """
    # A failed assertion would start a debugger, which takes up to a minute. Newer releases of ggml
    # ask this first; that of kt-kernel 0.7.2 has no switch.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        with _float_environment():
            from kt_kernel import kt_kernel_ext
    except ModuleNotFoundError as error:
        if error.name != "kt_kernel":
            raise BackendError(f"kt-kernel does not load: {error}") from error
        raise BackendError(f"kt-kernel is not installed: {KERNELS.remedy()}") from error
    except Exception as error:  # a wrong processor shows as RuntimeError, OSError or ImportError
        reason = " ".join(str(error).split())  # kt-kernel's own messages have several lines
        raise BackendError(f"kt-kernel does not load: {reason}") from error
    module: ModuleType = kt_kernel_ext
    return module


def kernel_types(variant: str) -> frozenset[str]:
    """GGML types that a build of kt-kernel computes.

    Args:
        variant: the build's name, such as `avx2`, `avx512_bf16` or `amx`.
    """
    if variant in BF16_VARIANTS:
        return KERNEL_TYPES
    return KERNEL_TYPES - {"BF16"}


def variant_name() -> str:
    """The build that kt-kernel has chosen for this processor; empty for one that does not say."""
    package = sys.modules.get("kt_kernel")
    return str(getattr(package, "__cpu_variant__", ""))


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Keep kt-kernel's greetings, which C++ writes to standard output, out of the user's answer."""
    flush = ctypes.CDLL(None).fflush
    with _STDOUT:
        # What C has buffered must go where it was meant to go, before and after.
        if sys.stdout is not None:
            sys.stdout.flush()
        flush(None)
        kept = os.dup(1)
        sink = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(sink, 1)
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
            os.close(sink)


@contextmanager
def _float_environment() -> Iterator[None]:
    """Undo what loading a library built with -ffast-math does to the thread.

    It makes the processor treat subnormal numbers as 0.
    """
    libm = ctypes.CDLL(None)
    kept = ctypes.create_string_buffer(64)  # fenv_t is 32 bytes on x86-64, smaller elsewhere
    if not hasattr(libm, "fegetenv") or libm.fegetenv(kept):
        yield
        return
    try:
        yield
    finally:
        libm.fesetenv(kept)
