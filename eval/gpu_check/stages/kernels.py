"""Every type, shape and number of tokens that kernels are given, against float64.

The reference is computed on the same device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from eval.gpu_check.place import Place, Row
from eval.kernel_cases.cases import cases, linear_cases, repack_cases
from eval.kernel_cases.runs import product_kernels, run_case, run_linear, run_repack


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`. One token first: a run that is cut off has judged decode.

    The interpreter is slow: a dry run leaves odd shapes and small tiles to the tests, which have
    the same cases.
    """
    device = place.device
    for repacked in repack_cases(place.dry):
        yield _judged(f"repack {repacked.name}", 0.5, run_repack, repacked, device)
    found = [
        case
        for case in cases(place.dry)
        if not place.dry or (case.shape.name == "small" and case.blocks)
    ]
    for case in sorted(found, key=lambda case: case.tokens):
        yield _judged(
            f"experts {case.name}",
            case.limit,
            run_case,
            case,
            product_kernels(case, device),
            device,
        )
    for linear in sorted(linear_cases(place.dry), key=lambda case: case.tokens):
        yield _judged(f"linear {linear.name}", linear.limit, run_linear, linear, device)


def _judged(name: str, limit: float, measure: Callable[..., float], *given: Any) -> Row:
    """One case's error, which must be below the limit.

    A case that cannot run is wrong, and the others are still tried. A CUDA error other than running
    out of memory spoils the process: then every case behind it fails too, and the first one's
    message is the one to read.
    """
    try:
        error = float(measure(*given))
    except Exception as problem:  # Triton and CUDA raise many kinds
        return {
            "case": name,
            "ok": False,
            "limit": limit,
            "detail": " ".join(str(problem).split())[:200],
        }
    return {
        "case": name,
        "ok": error < limit,
        "error": error,
        "limit": limit,
    }  # a NaN is not below anything
