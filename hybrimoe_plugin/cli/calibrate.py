"""`hybrimoe calibrate`: measure this machine for a model's experts and keep the result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe_plugin.cli.console import notice, tables
from hybrimoe_plugin.cli.demo_model import FORMS
from hybrimoe_plugin.cli.flags import add_flag, add_model, whole
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.config import ACCELERATORS, CPU_BACKENDS, Settings

if TYPE_CHECKING:
    from hybrimoe_plugin.policy.profile import MachineProfile, Side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that change what is measured; without a model it is the demo model."""
    add_model(parser)
    group = parser.add_argument_group("what to measure")
    add_flag(
        group,
        "cpu_backend",
        choices=CPU_BACKENDS,
        default="auto",
        help="kernels for experts on the CPU",
    )
    add_flag(
        group,
        "cpu_threads",
        type=whole(1),
        metavar="N",
        help="only this thread count; default: the best",
    )
    add_flag(
        group,
        "accelerator",
        choices=ACCELERATORS,
        default="auto",
        help="device for experts in slots",
    )
    add_flag(parser, "out", metavar="FILE", help="write the profile here too, for --profile")


def run(args: argparse.Namespace) -> int:
    """Measure, store where the engine looks, and show the numbers."""
    settings = Settings(
        cpu_backend=args.cpu_backend, cpu_threads=args.cpu_threads, accelerator=args.accelerator
    )
    import_libraries()
    gguf_path = args.gguf_path
    if gguf_path is None:
        from hybrimoe_plugin.cli.models import demo_gguf

        notice("no --gguf_path given: measuring with the demo model's experts")
        gguf_path = str(demo_gguf(FORMS[0]))
    backend, profile, path = _measure(args.model_path, gguf_path, settings)
    if args.out is not None:
        Path(args.out).write_text(profile.to_json(), encoding="utf-8")
    _show(profile, backend)
    if path.exists():  # not where the machine was busy, or the cache cannot be written
        print(path)
    return 0


def _measure(
    model_path: str | None, gguf_path: str, settings: Settings
) -> tuple[str, MachineProfile, Path]:
    """(CPU backend, profile, where it is kept)."""
    from hybrimoe_plugin.cli.models import first_experts, open_model
    from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
    from hybrimoe_plugin.engine.assemble import Devices, accelerator_kind
    from hybrimoe_plugin.engine.cpu_choice import choose_cpu, cpu_threads
    from hybrimoe_plugin.engine.profile_store import profile_path

    store, config = open_model(model_path, gguf_path)
    weights = first_experts(store, config)
    kind, where = accelerator_kind(settings, Devices("auto", "auto"))
    accelerator = make_accelerator(kind, where)
    backend, profile = choose_cpu(
        settings, [weights], accelerator, progress=sys.stderr.isatty(), refresh=True
    )
    threads = cpu_threads(settings, backend, accelerator is None)
    return backend, profile, profile_path(weights.spec, backend, kind, threads)


def _show(profile: MachineProfile, backend: str) -> None:
    from rich.table import Table

    spec = profile.spec
    types = "/".join(dict.fromkeys((spec.gate_type, spec.up_type, spec.down_type)))
    title = (
        f"{profile.name} ({profile.label}), {profile.hardware.get('cpu', 'unknown CPU')}: experts "
        f"of "
        f"{spec.hidden} x {spec.intermediate} in {types}, {spec.expert_bytes / 1e6:.2f} MB each"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("us per expert")
    for load in profile.cpu.tokens:
        table.add_column(f"{load} tok", justify="right")
    table.add_column("first expert", justify="right")
    table.add_row(
        f"CPU by {backend}, {profile.cpu.threads or '?'} thread(s)",
        *_cells(profile.cpu, profile.cpu.tokens),
    )
    if profile.accelerator is not None:
        table.add_row("accelerator", *_cells(profile.accelerator, profile.cpu.tokens))
    print(title)
    tables().print(table)
    if profile.link is not None:
        link, transfer_us = profile.link, profile.costs(spec).transfer_us
        print(
            f"link: {link.gbps:.1f} GB/s, latency {link.latency_us:.0f} us, {transfer_us:.0f} us "
            f"per expert"
        )
    for note in profile.notes:
        print(note)


def _cells(side: Side, loads: tuple[int, ...]) -> list[str]:
    from hybrimoe_plugin.policy.costs import CostCurve

    curve = CostCurve(side.tokens, side.us)
    return [*(f"{curve(load):.0f}" for load in loads), f"+{side.first_us:.0f}"]
