"""`hybrimoe patches`: list the patches that ktransformers needs in this environment."""

from __future__ import annotations

import argparse
import json

from hybrimoe_plugin.cli.console import tables
from hybrimoe_plugin.cli.flags import add_switch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_switch(parser, "json", "print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """List every patch: whether it is applied here, for which versions, and why it exists."""
    from hybrimoe_plugin.hosts.ktransformers.patches import decide
    from hybrimoe_plugin.hosts.ktransformers.release import installed

    decisions = decide()
    rows = [
        {
            "patch": decision.patch.name,
            "applied": decision.used,
            "here": decision.why,
            "versions": decision.patch.versions,
            "reason": decision.patch.reason,
        }
        for decision in decisions
    ]
    if args.json:
        print(json.dumps({"ktransformers": installed(), "patches": rows}))
        return 0
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None, padding=(0, 2, 0, 0), title=f"ktransformers {installed()}", title_justify="left"
    )
    for name in ("patch", "applied", "here", "versions", "reason"):
        table.add_column(name, overflow="fold")
    for row in rows:
        applied = Text("yes", "green") if row["applied"] else Text("no", "dim")
        table.add_row(
            Text(str(row["patch"])),
            applied,
            *(Text(str(row[key])) for key in ("here", "versions", "reason")),
        )
    tables().print(table)
    return 0
