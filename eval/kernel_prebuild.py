"""Compile the device kernels on a machine that has no GPU, into a cache that a machine with one
finds complete.

The product's own launch code runs on tensors that claim to lie on a GPU, with Triton's CUDA driver
replaced by one that compiles as the real one does and launches nothing. So everything that Triton's
cache key is made of is what it will be on the card: argument types, which of them are multiples of
16, tile sizes and options. The rest of the key (the kernels' source and its line numbers, Triton's
own files, ptxas' version, environment variables that change code) has to be the same there.

    python -m eval.kernel_prebuild --cache DIR

The last line is a JSON object. A second run tells by `compiled` and `launchers_built` what a card
would have to compile: nothing, if all is well (`scripts/gpu_bundle.py` asks that of a copy in
another folder).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from eval.kernel_cases import (
    MODEL_SHAPES,
    Case,
    LinearCase,
    RepackCase,
    Shape,
    candidate_cases,
    cases,
    linear_cases,
    product_kernels,
    repack_cases,
    stored_bytes,
)
from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, Part
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels

log = logging.getLogger(__name__)

CARD = torch.device("cuda:0")

AnyCase = Case | LinearCase | RepackCase

TINY = Shape("tiny model", ("Q8_0", "Q8_0", "Q8_0"), 64, 256, 8, 2, rounded_routing=True)
"""The check's tiny model that runs on these kernels (`eval.gpu_stages.graphs`)."""


@dataclass
class Count:
    """What happened to the kernels and to the C modules by which they are launched."""

    hits: int = 0
    compiled: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    launchers_built: int = 0
    launcher_problem: str = ""

    def add(self, other: Count) -> None:
        self.hits += other.hits
        self.compiled += other.compiled
        self.failed += other.failed
        self.launchers_built += other.launchers_built
        self.launcher_problem = self.launcher_problem or other.launcher_problem


# What is built, most valuable first: where a limit of time or room cuts, the end is lost.


def wanted() -> list[tuple[str, list[AnyCase]]]:
    """(name, cases) of everything that the check calls, in the order of its stages."""
    qwen, padded, mixtral = MODEL_SHAPES[:2], MODEL_SHAPES[5:7], MODEL_SHAPES[7:]
    recorded = [shape._replace(name=f"{shape.name}, top 6 as recorded", top_k=6) for shape in qwen]
    groups: dict[str, list[AnyCase]] = {}

    def add(kind: str, case: Case) -> None:
        groups.setdefault(f"{kind}, {case.shape.name} {'/'.join(case.shape.kinds)}", []).append(
            case
        )

    for case in cases(interpreted=False):
        add("experts", case)
    for linear in linear_cases():
        groups.setdefault(f"linears, {linear.model}", []).append(linear)
    groups["repacking"] = list(repack_cases())
    # Prompts of the check's models, in every size of tile.
    for shape in (*recorded, *padded, *mixtral):
        for tokens in (1, 20, 40, 96, 256):
            add("prompts", Case(shape, tokens))
    for shape in (*recorded, *qwen):
        add_tuning(add, shape, (torch.bfloat16,))
    for shape in (*padded, *mixtral):
        add_tuning(
            add, shape, ()
        )  # these routers' weights are float32 as well: no call differs from tuning's
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 12):
            add("tiny model", Case(TINY, tokens, dtype))
            for rows, columns in ((128, 64), (64, 64), (64, 128)):
                linear = LinearCase("tiny model", "Q8_0", rows, columns, tokens, dtype)
                groups.setdefault("linears, tiny model", []).append(linear)
    add_tuning(add, TINY, (torch.bfloat16, torch.float32))
    return list(groups.items())


def add_tuning(
    add: Callable[[str, Case], None], shape: Shape, calls: Sequence[torch.dtype]
) -> None:
    """Tiles that tuning tries before the first token, with float32 routing weights, and those it
    may choose.

    Args:
        calls: dtypes of states in calls after tuning that differ from tuning's own.
    """
    for case in candidate_cases([shape]):
        add("tuning", case)
        for dtype in calls:
            add("tuned", Case(shape, 1, dtype, case.blocks))


# Tensors that claim to lie on the card.


class OnCard(torch.Tensor):
    """Memory of the host that says it is the card's; nobody reads it."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        return self


class PretendCard(TorchFunctionMode):
    """Within, tensors are made on the host and say that they lie on the card."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        named = {name: _on_host(value) for name, value in (kwargs or {}).items()}
        found = func(*map(_on_host, args), **named)
        return found.as_subclass(OnCard) if type(found) is torch.Tensor else found


def _on_host(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def launch(case: AnyCase) -> None:
    """Call the kernels as `eval.kernel_cases` does, on memory that nobody has filled."""
    with PretendCard():
        if isinstance(case, Case):
            _launch_experts(case)
        elif isinstance(case, LinearCase):
            from hybrimoe_plugin.compute.gpu.kernels.linear import linear

            states = torch.empty(case.tokens, case.columns, dtype=case.dtype)
            linear(
                states,
                _bytes(stored_bytes(case.kind, case.rows, case.columns)),
                case.kind,
                case.rows,
            )
        else:
            _launch_repack(case.kind, case.blocks * BLOCK_BYTES[case.kind])


def _launch_experts(case: Case) -> None:
    kernels, shape = product_kernels(case, CARD), case.shape
    if isinstance(kernels, TorchKernels):
        return
    layout = kernels.layout(shape.spec)
    used = shape.experts - 1
    buffer = _bytes((used + 1) * layout.size).view(used + 1, -1)
    for part in layout:
        if part.planar:
            _launch_repack(part.type_name, part.size)
    slot_ids = (torch.arange(case.tokens * shape.top_k) % used).view(case.tokens, -1)
    hidden = torch.empty(case.tokens, shape.hidden, dtype=case.dtype)
    weights = torch.empty(case.tokens, shape.top_k, dtype=case.routing)
    call = SlotCall(buffer, layout, tuple(range(used)), hidden, slot_ids, weights)
    kernels.down(call, kernels.gate_up(call))


def _launch_repack(kind: str, size: int) -> None:
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    TritonKernels(CARD).repack(Part(kind, 1, 1, 0, size, planar=True), _bytes(size), _bytes(size))


def _bytes(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


# The driver that launches nothing.


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
            if (
                hasattr(nvidia, "make_launcher")
                and library_path is not None
                and not count.launcher_problem
            ):
                try:
                    super().__init__(src, metadata)
                except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
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
        except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
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


def build(
    share: Sequence[tuple[str, list[AnyCase]]],
    cache: Path,
    arch: int,
    library_path: Path | None,
    deadline: float,
) -> tuple[Count, list[str]]:
    """Compile groups in this process, which can have no other driver afterwards.

    Args:
        deadline: no group is begun after it, as `time.time` counts.

    Returns:
        what happened, and the names of the groups that there was no time for.
    """
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime.driver import driver

    count = Count()
    driver.set_active(make_driver(arch, library_path, count))
    for number, (name, group) in enumerate(share):
        if time.time() > deadline:
            return count, [name for name, _ in share[number:]]
        built, hits, begun = len(count.compiled), count.hits, time.monotonic()
        for case in group:
            try:
                launch(case)
            except (
                Exception
            ) as error:  # a tile that does not compile is one that tuning passes over
                log.debug("%s: %s", case.name, error, exc_info=True)
                count.failed.append(f"{case.name}: {type(error).__name__}: {error}")
        built, hits, spent = (
            len(count.compiled) - built,
            count.hits - hits,
            time.monotonic() - begun,
        )
        print(
            f"  {name}: {built} kernels compiled, {hits} found, {spent:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return count, []


def facts(arch: int) -> dict[str, Any]:
    """What has to be the same on a machine that uses the cache."""
    from triton import __version__
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    kernels = (
        Path(__file__).resolve().parent.parent / "hybrimoe_plugin" / "compute" / "gpu" / "kernels"
    )
    source = b"".join(
        (kernels / f"{name}.py").read_bytes()
        for name in ("decode", "formats", "linear", "prefill", "repack")
    )
    return {
        "arch": arch,
        "triton": __version__,
        "triton_files": _digest(triton_key().encode()),
        "ptxas": _digest(get_ptxas_version(arch).encode()),
        "kernels": _digest(source),
        "python_suffix": str(sysconfig.get_config_var("EXT_SUFFIX")),
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder for TRITON_CACHE_DIR")
    parser.add_argument(
        "--arch", type=int, default=90, help="compute capability, 90 for H100 and H200 (default)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1800.0, help="begin no further group after this long"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only groups whose names begin so"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="not this group; repeatable"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    args.cache.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    groups = [
        (name, group)
        for name, group in wanted()
        if name.startswith(args.only) and name not in args.skip
    ]
    deadline = time.time() + args.seconds
    total = Count()
    left_out: list[str] = []
    with (
        empty_libcuda() as library_path,
        ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        shares = [groups[first :: args.workers] for first in range(args.workers)]
        jobs = [
            pool.submit(build, share, args.cache, args.arch, library_path, deadline)
            for share in shares
            if share
        ]
        for job in jobs:
            found, missing = job.result()
            total.add(found)
            left_out += missing
    result = {
        **facts(args.arch),
        **asdict(total),
        "compiled": dict(Counter(total.compiled)),
        "left_out": left_out,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
