"""`hybrimoe explain`: a dry run of a rules file; no weights are loaded."""

from __future__ import annotations

import argparse
from typing import Any, Literal

from hybrimoe_plugin.cli.console import tables
from hybrimoe_plugin.cli.flags import add_model, add_switch
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rules",
        nargs="?",
        metavar="RULES",
        help="rules file, or name of packaged rules; default: by model family",
    )
    add_model(parser)
    add_switch(parser, "all", "show each module in a row of its own, not groups of layers")
    add_switch(parser, "trust_rules", "let the rules import classes from any package")


def run(args: argparse.Namespace) -> int:
    """Print a table: module, operator, device, rule."""
    if args.trust_rules and args.rules is None:
        raise ConfigError(
            "--trust_rules has no effect: it is about rules of your own: name their file too"
        )
    if args.model_path is None and args.gguf_path is None:
        raise ConfigError(
            "explain needs a model: give --model_path (its config.json is enough) or --gguf_path"
        )
    import_libraries()
    from hybrimoe_plugin.hosts.transformers.load import plan_for
    from hybrimoe_plugin.injection.explain import explain_rows, untouched

    model, rules, plan = plan_for(
        args.model_path, args.gguf_path, args.rules, trust_rules=args.trust_rules
    )
    rows = explain_rows(plan, show_all=args.all)
    _print(rows, f"{type(model).__name__} by {rules.source}")
    replaced = sum(match.replaces for match in plan)
    placed = len(plan) - replaced
    left = untouched(model, plan)
    tables().print(
        f"{replaced} modules replaced, {placed} placed, {left} with weights left as they are."
    )
    return 0


def _print(rows: list[Any], title: str) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("module", "", "class", "operator", "device", "rule"):
        justify: Literal["left", "right"] = "left" if heading else "right"
        table.add_column(heading, overflow="fold", justify=justify)
    for row in rows:
        name = row.module or "(whole model)"
        count = f"x{row.count}"
        cells = (name, count, row.original, row.operator, row.device, row.rule)
        table.add_row(*map(_plain, cells))
    print(title)
    tables().print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    # Names from a rules file are not markup.
    return Text(text)
