"""`hybrimoe calibrate`: measure this machine for a model's experts and store the profile."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe_plugin.cli.console import notice, tables
from hybrimoe_plugin.cli.flags import add_flag, add_model
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.cli.setting_flags import add_setting, given_settings
from hybrimoe_plugin.config import DEMO_FORMS, Settings

if TYPE_CHECKING:
    from rich.table import Table

    from hybrimoe_plugin.policy.profile import MachineProfile, Side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that change what is measured."""
    add_model(parser)
    group = parser.add_argument_group("what to measure")
    for name in ("cpu_backend", "cpu_threads", "accelerator"):
        add_setting(group, name)
    add_flag(
        parser, "out", metavar="FILE", help="write the profile to this file too, for --profile"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, store the profile where the engine looks for it, and show the numbers."""
    settings = Settings.of(given_settings(args))
    import_libraries()
    if settings.accelerator == "cuda":
        from hybrimoe_plugin.device.machine import cuda_device

        # Refused before the demo model is built.
        cuda_device("cuda", instead="--accelerator none")
    gguf_path = args.gguf_path or args.model_path
    if gguf_path is None:
        from hybrimoe_plugin.cli.models import demo_gguf

        notice("no --gguf_path given: measuring with the demo model's experts")
        gguf_path = str(demo_gguf(DEMO_FORMS[0]))
    backend, profile, path = _measure(args.model_path, gguf_path, settings)
    if args.out is not None:
        Path(args.out).write_text(profile.to_json(), encoding="utf-8")
    _show(profile, backend)
    # Nothing is stored where the machine was busy or the cache folder cannot be written.
    if path.exists():
        print(path)
    return 0


def _measure(
    model_path: str | None, gguf_path: str, settings: Settings
) -> tuple[str, MachineProfile, Path]:
    """(CPU backend, profile, path where the profile is stored)."""
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
    print(_title(profile))
    tables().print(_table(profile, backend))
    if profile.link is not None:
        link = profile.link
        transfer_us = profile.costs(profile.spec).transfer_us
        print(
            f"link: {link.gbps:.1f} GB/s, latency {link.latency_us:.0f} us, "
            f"{transfer_us:.0f} us per expert"
        )
    for note in profile.notes:
        print(note)


def _title(profile: MachineProfile) -> str:
    spec = profile.spec
    # Each type once, in this order.
    types = dict.fromkeys((spec.gate_type, spec.up_type, spec.down_type))
    cpu = profile.hardware.get("cpu", "unknown CPU")
    megabytes = spec.expert_bytes / 1e6
    return (
        f"{profile.name} ({profile.label}), {cpu}: experts of {spec.hidden} x {spec.intermediate} "
        f"in {'/'.join(types)}, {megabytes:.2f} MB each"
    )


def _table(profile: MachineProfile, backend: str) -> Table:
    """A row for each load, and one for what the first expert of a layer costs more."""
    from rich.table import Table

    from hybrimoe_plugin.policy.step import FEW_ROWS

    loads = profile.cpu.tokens
    threads = profile.cpu.threads or "?"
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("us per expert")
    table.add_column(f"CPU by {backend}, {threads} thread(s)", justify="right")
    columns = [_cells(profile.cpu, loads)]
    if profile.cpu_few_rows is not None:
        table.add_column(f"CPU, 2 to {FEW_ROWS} rows", justify="right")
        columns.append(_cells(profile.cpu_few_rows, loads, FEW_ROWS))
    if profile.accelerator is not None:
        table.add_column("accelerator", justify="right")
        columns.append(_cells(profile.accelerator, loads))
    names = [f"{load} token{'s' * (load > 1)}" for load in loads]
    for row in zip([*names, "first expert"], *columns, strict=True):
        table.add_row(*row)
    return table


def _cells(side: Side, loads: tuple[int, ...], most: int | None = None) -> list[str]:
    """Time of an expert for each load up to `most`, and what a layer's first one costs more."""
    from hybrimoe_plugin.policy.costs import CostCurve

    curve = CostCurve(side.tokens, side.us)
    cells = ["" if most is not None and load > most else f"{curve(load):.0f}" for load in loads]
    return [*cells, f"+{side.first_us:.0f}"]
