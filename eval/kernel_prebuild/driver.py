"""A CUDA driver for Triton that compiles as the real one does and launches nothing."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_BUILD_ERRORS = (OSError, RuntimeError, ImportError, subprocess.CalledProcessError)
"""What Triton raises when it cannot build or load a C module."""


@dataclass
class Count:
    """What happened to the kernels and to the C modules by which they are launched."""

    hits: int = 0
    compiled: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    launchers_built: int = 0
    launcher_problem: str = ""

    def add(self, other: Count) -> None:
        """Add what happened in another process."""
        self.hits += other.hits
        self.compiled += other.compiled
        self.failed += other.failed
        self.launchers_built += other.launchers_built
        self.launcher_problem = self.launcher_problem or other.launcher_problem


def make_driver(arch: int, library_path: Path | None, count: Count) -> Any:
    """A `CudaDriver` for a card of this architecture.

    Args:
        library_path: folder of a `libcuda.so.1` to link launchers with; None leaves launchers out.
        count: told of launchers that were built.
    """
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build

    class NoLauncher(nvidia.CudaLauncher):
        """Builds the C module that launches a kernel of this signature, and does not call it."""

        def __init__(self, src: Any, metadata: Any) -> None:
            # Later releases than 3.6 launch every kernel by one function of the driver's module.
            if not hasattr(nvidia, "make_launcher"):
                return
            if library_path is None or count.launcher_problem:
                return
            try:
                super().__init__(src, metadata)
            except _BUILD_ERRORS as error:
                count.launcher_problem = str(error)

        def __call__(self, *args: Any) -> None:
            """A launch without a card."""

    class Utilities:
        def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
            return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

        def get_device_properties(self, _device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

    class NoCard(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils = Utilities()
            self.launcher_cls = NoLauncher
            self.get_current_device = lambda: 0
            self.get_device_capability = lambda _device=0: divmod(arch, 10)
            self.get_current_stream = lambda _device=0: 0

    if library_path is not None:
        os.environ["TRITON_LIBCUDA_PATH"] = str(library_path)
        # What is built calls functions that are found only where there is a card: bind them when
        # they are called.
        sys.setdlopenflags(os.RTLD_LAZY)
        ctypes.CDLL(str(library_path / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        plain = build._build

        def counted(*args: Any, **named: Any) -> Any:
            count.launchers_built += 1
            return plain(*args, **named)

        build._build = counted
        try:
            # the driver's own module, which the first launch on a card builds too
            nvidia.CudaUtils()
        except _BUILD_ERRORS as error:
            count.launcher_problem = str(error)

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            count.hits += 1
        else:
            count.compiled.append(src.name)

    knobs.compilation.listener = listen
    return NoCard()


@contextmanager
def empty_libcuda() -> Iterator[Path | None]:
    """A folder with a `libcuda.so.1` that has nothing in it; None where there is no C compiler."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, library = folder / "empty.c", folder / "libcuda.so.1"
        source.write_text("", encoding="utf-8")
        compiler = os.environ.get("CC", "gcc")
        command = [compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning(
                "no C compiler (%s): launchers are left out, a card's machine builds them in "
                "seconds",
                error,
            )
            yield None
            return
        yield folder
