"""How long does loading a large file take, and how much memory?

The files are synthetic: the shape of Qwen3-30B-A3B in Q4_K, in which every weight is zero. They are
written as holes, so that they take no room on the disk, but reading them takes memory as usual. One
has the experts of a layer in one tensor, as files have today, the other gives each expert tensors
of its own, which makes tens of thousands. Each is loaded twice: read into memory, as is usual on a
CPU alone, and mapped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tqdm.auto import tqdm

from eval.models import synthetic
from eval.reporting import report
from eval.reporting.quantiles import percentiles

MODEL = "qwen3-30b-a3b"
LAYOUTS = {"stacked": True, "one tensor per expert": False}
WEIGHTS = ("memory", "mapped")
_GIB = 1 << 30
_BYTES = np.dtype(np.uint8)
_CHILD = "--child"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; gives the contents of the JSON line."""
    parser = report.parser(__doc__ or "")
    parser.add_argument("--layers", type=int, help="layers of the file (default 32; quick: 1)")
    parser.add_argument("--repetitions", type=int, help="loads of each file (default 5; quick: 1)")
    args = parser.parse_args(arguments)
    layers = args.layers or (1 if args.quick else 32)
    repetitions = args.repetitions or (1 if args.quick else 5)
    facts = report.facts()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layout, stacked in LAYOUTS.items():
            path = Path(folder) / "model.gguf"
            tensors = write_zeros(path, synthetic.config(MODEL, layers), stacked)
            for weights in WEIGHTS:
                shown = tqdm(range(repetitions), desc=f"{layout}, {weights}", disable=None)
                found = [load(path, weights) for _ in shown]
                rows.append({**row(layout, weights, tensors, path, found), **facts})
    report.show("Loading a large file", rows)
    report.save_csv(args.out / "loading.csv", rows)
    worst = {
        weights: max(
            (item for item in rows if item["weights"] == weights),
            key=lambda item: item["seconds_p50"],
        )
        for weights in WEIGHTS
    }
    result = {
        "model": MODEL,
        "gib": worst["mapped"]["gib"],
        "tensors": max(item["tensors"] for item in rows),
        "seconds_p50": worst["memory"]["seconds_p50"],
        "mapped_seconds_p50": worst["mapped"]["seconds_p50"],
        "mapped_anonymous_mib": max(
            item["anonymous_mib"] for item in rows if item["weights"] == "mapped"
        ),
        "dense_mib": worst["mapped"]["dense_mib"],
    }
    report.finish(result)
    return result


def row(
    layout: str, weights: str, tensors: int, path: Path, found: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """One line of the table."""
    low, middle, high = percentiles([item["seconds"] for item in found])
    return {
        "layout": layout,
        "weights": weights,
        "tensors": tensors,
        "gib": path.stat().st_size / _GIB,
        "seconds_p20": low,
        "seconds_p50": middle,
        "seconds_p80": high,
        "repetitions": len(found),
        "anonymous_mib": max(item["anonymous_mib"] for item in found),
        "dense_mib": found[0]["dense_mib"],
    }


def write_zeros(path: Path, made: Any, stacked: bool, down: str = "Q4_K") -> int:
    """Write a model of this config as holes behind a header; gives the number of its tensors.

    Args:
        down: type of the experts' last matrix.
    """
    from hybrimoe_plugin.families.gguf_metadata import metadata
    from hybrimoe_plugin.families.registry import family_of
    from hybrimoe_plugin.hosts.transformers.gguf_export import add_value, tensors
    from hybrimoe_plugin.hosts.transformers.skeleton import meta_model

    family = family_of(made.model_type)
    writer = GGUFWriter(str(path), family.architectures[0])
    for key, value in metadata(made, family).items():
        add_value(writer, key, value)
    writer.add_tokenizer_model("none")
    shown = tensors(meta_model(made), family, stacked=stacked)
    total = 0
    for name, value in shown.items():
        shape = tuple(value.shape)
        kind = GGMLQuantizationType[_kind(name, shape, down)]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = value.numel() // block * block_bytes
        if kind == GGMLQuantizationType.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        else:
            stored = (*shape[:-1], shape[-1] // block * block_bytes)
            writer.add_tensor_info(name, stored, _BYTES, size, raw_dtype=kind)
        total += -(-size // writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = -(-path.stat().st_size // writer.data_alignment) * writer.data_alignment
    with path.open("r+b") as file:
        file.truncate(header + total)
    return len(shown)


def load(path: Path, weights: str) -> dict[str, float]:
    """Load the file in a process of its own, and give what that took."""
    command = [sys.executable, "-m", "eval.loading", _CHILD, str(path), weights]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=report.ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(path: str, weights: str) -> None:
    """Load a file, and print seconds, anonymous memory and that of its parameters as JSON."""
    import time

    # Imports are not part of loading.
    from hybrimoe_plugin.hosts.transformers import load_model

    before = _anonymous_mib()
    started = time.monotonic()
    settings: Any = {"weights": weights}
    model, _ = load_model(None, path, progress=False, **settings)
    seconds = time.monotonic() - started
    dense = sum(parameter.nbytes for parameter in model.parameters())
    print(
        json.dumps(
            {
                "seconds": seconds,
                "anonymous_mib": _anonymous_mib() - before,
                "dense_mib": dense / (1 << 20),
            }
        )
    )
    model.hybrimoe.close()


def _anonymous_mib() -> float:
    """Memory of this process that is no file's pages."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _kind(name: str, shape: tuple[int, ...], down: str) -> str:
    if "ffn_down_exps" in name:
        return down
    return "F32" if len(shape) == 1 or "ffn_gate_inp" in name else "Q4_K"


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        child(*sys.argv[2:])
    else:
        main()
