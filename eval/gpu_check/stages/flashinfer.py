"""flashinfer's decode attention and sampling filters against what the product uses without it."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator

import torch

from eval.gpu_check.place import Place, Row
from eval.gpu_check.stages.attention import CASES, Case, measured, named
from hybrimoe_plugin.compute.attention import flashinfer_pages, kernel_choice
from hybrimoe_plugin.device.cuda_graphs import Capture, capture_for
from hybrimoe_plugin.hosts.transformers import sampling
from hybrimoe_plugin.hosts.transformers.sampling import Filters, FlashinferFilter

HOW_TO_GET = (
    "flashinfer is not installed: pip install 'flashinfer-python>=0.7', and a CUDA toolkit whose "
    "nvcc is on the PATH "
    "(or the package flashinfer-jit-cache for the same CUDA version), because it compiles its "
    "kernels at first use"
)
ROOMS = (1024, 4096)
DRY_ROOMS = (64, 128)
VOCABULARY = 151_936
"""Qwen3's, the largest among the models."""
DRY_VOCABULARY = 1000
FILTERS = (
    # What Qwen3's generation config asks for.
    Filters(temperature=0.6, top_k=20, top_p=0.95, min_p=0.0),
    Filters(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0),
    Filters(temperature=0.7, top_k=50, top_p=0.8, min_p=0.05),
)


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    if not flashinfer_pages.installed():
        yield {"case": "flashinfer", "ok": None, "missing": HOW_TO_GET}
        return
    capture = capture_for(place.device)
    if capture is None:
        yield {
            "case": "flashinfer",
            "ok": None,
            "missing": "a CUDA device: flashinfer runs on nothing else",
        }
        return
    yield {"case": "flashinfer", "version": _version()}
    for case in CASES:
        for room in DRY_ROOMS if place.dry else ROOMS:
            yield _attention(case, room, place.device, capture)
    for filters in FILTERS:
        yield _filters(filters, DRY_VOCABULARY if place.dry else VOCABULARY, place.device)


def _attention(case: Case, room: int, device: torch.device, capture: Capture) -> Row:
    """One shape: right, how long either takes, and whether it is faster with its plans."""
    position = torch.zeros(1, dtype=torch.int64, device=device)
    row: Row = {"case": named(case, room), "layers": case.layers, "chosen": False}
    try:
        kernel = kernel_choice.flashinfer(case.shape._replace(capacity=room), device)
        row = {**row, **measured(kernel, device, capture, position)}
        plan_us = kernel_choice.plan_us(kernel)
    except Exception as problem:  # it compiles at first use, and may raise anything
        return {"case": row["case"], "ok": None, "missing": _failure(problem)}
    if not row["ok"]:
        return row
    flash_us = row.pop("kernel_us")
    chosen = flash_us + plan_us / case.layers < row["torch_us"]
    return {**row, "flashinfer_us": flash_us, "plan_us": plan_us, "chosen": chosen}


def _filters(filters: Filters, vocabulary: int, device: torch.device) -> Row:
    """One set of sampling filters, likewise."""
    name = f"sampling, {filters}, {vocabulary} tokens"
    generator = torch.Generator().manual_seed(1)
    scores = 4.0 * torch.randn(2, vocabulary, generator=generator)
    scores = scores.to(device)
    plain = filters.plain()
    try:
        library = importlib.import_module("flashinfer")
        flash = FlashinferFilter(library.sampling, filters)
        error = sampling.distance(flash.filtered(scores), plain(None, scores))
        plain_us = sampling.median_wall_us(lambda: plain(None, scores[:1]), device)
        flash_us = sampling.median_wall_us(lambda: flash.filtered(scores[:1]), device)
    except Exception as problem:  # as above
        return {"case": name, "ok": None, "missing": _failure(problem)}
    chosen = sampling.choose(filters, vocabulary, device, sampling.median_wall_us)
    return {
        "case": name,
        "ok": error <= sampling.TOLERANCE,
        "total_variation": error,
        "transformers_us": plain_us,
        "flashinfer_us": flash_us,
        "chosen": chosen is not None,
    }


def _failure(problem: Exception) -> str:
    return f"flashinfer does not run here: {_line(problem)}"


def _line(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]


def _version() -> str:
    try:
        return importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
