"""What do the device kernels cost a GPU in instructions, registers and bytes?

They are compiled for GPUs that need not be there, by the same compiler that runs on a card, and
taken apart with the disassembler that comes with it. Shapes are Qwen3-30B-A3B's.

`instructions_per_weight` are those that the threads of a decode kernel's program execute from its
start to its end, divided by the weights that the program multiplies: what matters at this shape,
where most loops have one pass. `loop_per_weight` are those of the main loop alone, for a matrix
with many columns. The loop is found in the code by its branch backwards; instructions that are
predicated off count, since they are issued too.

`memory_share_at_most` is how much of the memory's speed one card of the generation can use if it
issues an instruction in every cycle: calculated from its data sheet, not measured. Where the table
has no room for it, it is in the CSV.

The last line has the most instructions of all stages and architectures, for each type.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from eval.reporting import report
from eval.reporting.parallel import mapped

ARCHITECTURES = (80, 90, 120)
QUICK_ARCHITECTURES = (90,)
QUICK_TYPES = ("Q4_K", "Q8_0")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; gives the contents of the JSON line."""
    from hybrimoe_plugin.compute.gpu.kernels.formats.description import SUPPORTED

    parser = report.parser(__doc__ or "", "python -m eval.kernels")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--arch", type=int, nargs="+", help="compute capabilities (default 80 90 120; quick: 90)"
    )
    parser.add_argument(
        "--types",
        nargs="+",
        choices=SUPPORTED,
        metavar="TYPE",
        help=f"GGML types (default all; quick: {' '.join(QUICK_TYPES)})",
    )
    args = parser.parse_args(arguments)
    architectures = args.arch or (QUICK_ARCHITECTURES if args.quick else ARCHITECTURES)
    types = args.types or (QUICK_TYPES if args.quick else SUPPORTED)
    # Interpreted kernels cannot be compiled. Triton is imported from here on, and by the processes
    # that compile.
    os.environ.pop("TRITON_INTERPRET", None)
    from eval.kernels.rows import Job, rows

    jobs = [Job(kind, arch, args.quick) for arch in architectures for kind in types]
    found = [row for some in mapped(rows, jobs, "compiling") for row in some]
    _show(found)
    report.save_csv(args.out / "kernels.csv", _same_columns(found))
    result = _result(found)
    report.finish(result)
    return result


def _show(found: Sequence[dict[str, Any]]) -> None:
    """A table of the decode kernels for each architecture, and one of all others."""
    for arch in dict.fromkeys(row["arch"] for row in found):
        counted = [row for row in found if row["arch"] == arch and _is_decode(row)]
        report.show(f"Decode kernels, {arch}", _same_columns(counted))
    others = [row for row in found if not _is_decode(row)]
    if others:
        report.show(
            "Registers of the other kernels, and bytes spilled where there are", _wide(others)
        )


def _is_decode(row: dict[str, Any]) -> bool:
    return "bytes_per_weight" in row


def _same_columns(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for row in found for name in row)
    return [{name: row.get(name, "") for name in names} for row in found]


def _wide(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each type and architecture, one column for each kernel."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found:
        key = (row["arch"], row["type"])
        line = table.setdefault(key, {"arch": row["arch"], "type": row["type"]})
        spilled = f" ({row['spilled_bytes']})" if row["spilled_bytes"] else ""
        line[row["stage"]] = f"{row['registers']}{spilled}"
    return _same_columns(list(table.values()))


def _result(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    spilled = [row for row in found if row["spilled_bytes"]]
    return {
        "kernels": len(found),
        "architectures": list(dict.fromkeys(row["arch"] for row in found)),
        "types": len({row["type"] for row in found}),
        "most_registers": max(row["registers"] for row in found),
        "spilled": [f"{row['arch']} {row['stage']} {row['type']}" for row in spilled],
        "not_counted": [
            f"{row['arch']} {row['stage']} {row['type']}"
            for row in found
            if _is_decode(row) and "instructions_per_weight" not in row
        ],
        "instructions_per_weight": _worst(found, "instructions_per_weight"),
        "loop_per_weight": _worst(found, "loop_per_weight"),
    }


def _worst(found: Sequence[dict[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """Activations -> type -> most over architectures and stages."""
    most: dict[str, dict[str, float]] = {}
    for row in found:
        if name in row:
            kinds = most.setdefault(row["activations"], {})
            kinds[row["type"]] = max(kinds.get(row["type"], 0.0), round(row[name], 2))
    return most
