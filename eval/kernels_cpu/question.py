"""How near do the CPU's products with one row come to the memory's bandwidth?

For each type and shape of the matrices that a token reads, a row is multiplied by one matrix after
the other, through more of them than caches hold: as many bytes as the bandwidth is measured with,
copied from the file, several times where it has fewer. `us` is the median time of one product,
`gbps` counts stored bytes only, and `share` is its part of what plain sums read, before or after
the products, whichever was faster. Where `walked_mb` is small the matrices are tiny, and caches may
have helped.

The last row adds up a token: what its products alone would take. Attention itself, norms,
activations, and Python between the graphs come on top of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from eval.kernels_cpu.kinds import Kind, kinds, streamed
from eval.kernels_cpu.products import product_us
from eval.models import files
from eval.peers import roofline
from eval.reporting import plots, report
from eval.reporting.quantiles import percentiles
from eval.reporting.rows import column
from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.compute.cpu.repack import SLOW_TYPES, as_q8_0, faster_as_q8_0
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.hosts.transformers.config import model_config
from hybrimoe_plugin.weights.gguf_store import GGUFStore

WALKED = 1 << 29
"""Bytes of one pass, as many as `roofline.read_gbps` reads."""
MOST = 4096
"""Matrices of one pass: a router of 20 kB would have tens of thousands."""
SLICES: files.Slices = {
    # A layer keeps all its experts; every kind of matrix is there.
    "deepseek-v2-lite": (4, None),
    "qwen2-57b-a14b": (2, None),
    "qwen3-30b-a3b": (4, None),
    "mixtral-8x7b": (1, None),
}
TOKEN = "all of a token"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; gives the contents of the JSON line."""
    parser = report.parser(__doc__ or "", "python -m eval.kernels_cpu")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    files.add_options(parser)
    parser.add_argument("--repeats", type=int, help="passes of each kind (default 20, quick 5)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    name, gguf = files.chosen(args, SLICES)
    repeats = args.repeats or (5 if args.quick else 20)
    before = roofline.read_gbps(args.threads)
    rows, skipped = measure(gguf, args.model_path, args.threads, repeats)
    read_gbps = max(before, roofline.read_gbps(args.threads))
    rows = [_with_share(row, read_gbps) for row in rows]
    print(f"memory: {read_gbps:.1f} GB/s with {args.threads} threads", flush=True)
    title = f"{name}: products of one row, {args.threads} threads, {repeats} passes (measured)"
    report.publish(title, rows, args.out / f"kernels_cpu_{name}", draw)
    total = rows[-1]
    slowest = min(rows[:-1], key=lambda row: float(row["gbps"]))
    result = {
        "model": name,
        "threads": args.threads,
        "read_gbps": read_gbps,
        "token_mb": total["token_mb"],
        "token_us": total["token_us"],
        "gbps": total["gbps"],
        "bandwidth_share": total["share"],
        "slowest": f"{slowest['matrices']} {slowest['type']}",
        "slowest_share": slowest["share"],
        "without_kernel": skipped,
    }
    report.finish(result)
    return result


def measure(
    gguf: Path, model_path: Path | None, threads: int, repeats: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row for each kind and one for all of them, types without a kernel).

    Raises:
        BackendError: there is no kernel for any kind.
    """
    store = GGUFStore.open(gguf)
    ggml = Ggml()
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    found = kinds(store, model_config(model_path, store))
    for kind in tqdm(found, desc="kinds of matrices", file=sys.stderr, disable=None):
        try:
            rows.append(_row(ggml, store, kind, threads, repeats))
        except BackendError as error:
            print(f"{', '.join(kind.parts)}: {error}", file=sys.stderr, flush=True)
            skipped.append(kind.type_name)
    if not rows:
        raise BackendError(f"{gguf}: no matrix has a type with a kernel")
    token_mb, token_us = sum(column(rows, "token_mb")), sum(column(rows, "token_us"))
    total = {
        "matrices": TOKEN,
        "token_mb": token_mb,
        "gbps": 1e3 * token_mb / token_us,
        "products": sum(column(rows, "products")),
        "token_us": token_us,
    }
    return [*rows, {**dict.fromkeys(rows[0], ""), **total}], skipped


def _with_share(row: dict[str, Any], read_gbps: float) -> dict[str, Any]:
    """The same row with the share of the bandwidth behind the GB/s."""
    shown: dict[str, Any] = {}
    for name, value in row.items():
        shown[name] = value
        if name == "gbps":
            shown["share"] = value / read_gbps
    return shown


def _row(ggml: Ggml, store: GGUFStore, kind: Kind, threads: int, repeats: int) -> dict[str, Any]:
    """One kind's row. Raises: BackendError: a type without a kernel."""
    ggml.require(kind.type_name)
    matrices = streamed(store, kind, WALKED, MOST)
    type_name = kind.type_name
    slow = kind.are_experts and type_name in SLOW_TYPES
    if slow and faster_as_q8_0(ggml, threads, type_name):
        # As operators write experts, and nothing else, out while they load.
        matrices = [as_q8_0(stored) for stored in matrices]
        type_name = f"{type_name} as Q8_0"
    low, us, high = percentiles(product_us(ggml, matrices, threads, repeats))
    size = matrices[0].nbytes
    return {
        "matrices": ", ".join(kind.parts),
        "type": type_name,
        "shape": "x".join(map(str, kind.shape)),
        "token_mb": kind.per_token * size / 1e6,
        "us": us,
        "gbps": size / us / 1e3,
        "products": kind.per_token,
        "token_us": kind.per_token * us,
        "us_p20": low,
        "us_p80": high,
        "walked_mb": len(matrices) * size / 1e6,
    }


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Bandwidth of each kind's products, one bar for each."""
    names = [f"{row['matrices']} {row['type']}".strip() for row in rows]
    plots.bars(axes, names, column(rows, "gbps"), "{:.3g}", [plots.OURS] * len(rows))
    axes.set_title("What products of one row read")
    axes.set_xlabel("GB/s (measured)")
