"""`hybrimoe explain`: a dry run of rules and settings; no weights are loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hybrimoe_plugin.cache_folder import write_atomic
from hybrimoe_plugin.cli.console import tables
from hybrimoe_plugin.cli.flags import add_flag, add_model, add_switch, device, path
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.cli.picture.svg import is_ours
from hybrimoe_plugin.cli.setting_flags import add_settings, given_settings
from hybrimoe_plugin.device.choice import placed
from hybrimoe_plugin.errors import ConfigError, HybriMoEError
from hybrimoe_plugin.files import check_replaceable, printable

if TYPE_CHECKING:
    from hybrimoe_plugin.hosts.transformers.preparation.prediction import Prediction
    from hybrimoe_plugin.hosts.transformers.preparation.prepare import Prepared
    from hybrimoe_plugin.injection.explain import Untouched
    from hybrimoe_plugin.injection.explain_settings import SettingRow

_OURS = "hybrimoe_plugin."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rules",
        nargs="?",
        type=path,
        metavar="RULES",
        help="rules file, or name of packaged rules; default: by model family",
    )
    group = add_model(parser)
    add_flag(group, "rules", dest="rules_flag", metavar="YAML", help="the same as RULES")
    add_flag(
        group,
        "device",
        type=device,
        metavar="DEVICE",
        help="where to compute, as for local_chat: cuda, cuda:N, cpu or emulated; predicted for "
        "a GPU that is not there too",
    )
    add_switch(parser, "all", "show each module in a row of its own, its class, and every setting")
    add_switch(parser, "trust_rules", "let the rules import classes from any package")
    add_flag(
        parser,
        "picture",
        metavar="FILE",
        help="draw the layers and where each part will lie, as an SVG file",
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Print what the rules replace, what every setting is, and where memory will go."""
    rules = _rules(args)
    if args.trust_rules and rules is None:
        raise ConfigError(
            "--trust_rules has no effect: it is about rules of your own: name their file too"
        )
    if args.model_path is None and args.gguf_path is None:
        raise ConfigError(
            "explain needs a model: give --model_path (its config.json is enough) or --gguf_path"
        )
    given = given_settings(args)
    settings = placed(given, args.device)
    if args.picture is not None:
        check_replaceable(args.picture, "--picture", "picture of explain's", is_ours)
    import_libraries()
    from hybrimoe_plugin.hosts.transformers.preparation.prepare import plan_for
    from hybrimoe_plugin.injection.explain import explain_rows, untouched
    from hybrimoe_plugin.injection.explain_settings import setting_rows

    prepared = plan_for(
        args.model_path, args.gguf_path, rules, trust_rules=args.trust_rules, **settings
    )
    model, plan = prepared.model, prepared.plan
    print(printable(f"{type(model).__name__} by {prepared.rules.source}"))
    rows = explain_rows(plan, show_all=args.all)
    _print_modules(rows, with_classes=args.all)
    _print_left(plan, untouched(model, plan))
    flags = {} if "accelerator" in given else {"accelerator": "device"}
    _print_settings(setting_rows(prepared.planned, flags), show_all=args.all)
    prediction = _predict(prepared)
    if args.picture is not None:
        _draw(args.picture, prepared, prediction)
    return 0


def _rules(args: argparse.Namespace) -> str | None:
    """The rules, named in either way. Raises: ConfigError: in both, and they differ."""
    named: list[str] = [name for name in (args.rules, args.rules_flag) if name is not None]
    if len(set(named)) > 1:
        raise ConfigError(f"RULES {named[0]} and --rules {named[1]} differ: give one of them")
    return named[0] if named else None


def _print_modules(rows: Iterable[Any], with_classes: bool) -> None:
    # Grouped rows leave the model's classes out, to fit into 100 columns.
    headings = ["module", "", *(["class"] if with_classes else []), "operator", "device", "rule"]
    cells = []
    for row in rows:
        name = row.module or "(whole model)"
        operator = row.operator
        if operator.startswith(_OURS):
            operator = operator.rpartition(".")[2]
        original = [row.original] if with_classes else []
        cells.append((name, f"x{row.count}", *original, operator, row.device, row.rule))
    _table(headings, cells, numbers=1)


def _print_left(plan: Sequence[Any], left: Sequence[Untouched]) -> None:
    replaced = sum(match.replaces for match in plan)
    kept = len(plan) - replaced
    count = sum(item.count for item in left)
    said = [f"{replaced} modules replaced"]
    if kept:
        said.append(f"{kept} only given a device")
    if left:
        said.append(f"{count} modules with weights stay transformers' own:")
    print("; ".join(said))
    if left:
        cells = [(f"  {item.module}", f"x{item.count}", item.original) for item in left]
        _table(None, cells, numbers=1)


def _print_settings(rows: Sequence[SettingRow], show_all: bool) -> None:
    from hybrimoe_plugin.injection.explain_settings import set_names

    shown = {row.name for row in rows} if show_all else set_names(rows)
    cells = []
    for row in rows:
        if row.name in shown:
            set_by = row.set_by or "default, and no operator here uses it"
            cells.append((row.name, row.value, set_by, row.modules))
    print()
    if cells:
        _table(("setting", "value", "set by", ""), cells)
    others = len({row.name for row in rows} - shown)
    if others:
        which = "other settings have" if cells else "settings all have"
        print(f"{others} {which} their defaults (--all shows them)")


def _predict(prepared: Prepared) -> Prediction | None:
    """Print where memory will go, and what loading would say about it."""
    from hybrimoe_plugin.hosts.transformers.preparation.accelerators import idle_cache
    from hybrimoe_plugin.hosts.transformers.preparation.predict import predict

    print()
    if prepared.store is None:
        print("memory: not predicted without weights; give --gguf_path")
        return None
    try:
        injection = prepared.inject()
        prediction = predict(prepared, injection.devices)
    except HybriMoEError as error:
        _warn(f"loading would be refused: {error}")
        return None
    _print_memory(prediction)
    idle = idle_cache(prepared.plan)
    if idle is not None:
        print(printable(f"note: {idle}"))
    try:
        prediction.check()
    except HybriMoEError as error:
        _warn(f"loading would be refused: {error}")
    else:
        for warning in prediction.warnings():
            _warn(warning)
    return prediction


def _warn(text: str) -> None:
    print(printable(f"warning: {text}"))


def _print_memory(prediction: Prediction) -> None:
    from hybrimoe_plugin.device.memory import human
    from hybrimoe_plugin.hosts.transformers.preparation.prediction import MEMORY, PLACES

    cells = []
    for place in prediction.places():
        name = PLACES.get(place, place)
        for part in prediction.parts:
            if part.place == place and part.nbytes:
                size = human(part.nbytes)
                cells.append((name, part.what, f"up to {size}" if part.most else size))
                name = ""
    _table(("memory", "part", "size"), cells, numbers=2)
    lines = []
    for place, free in prediction.free.items():
        if place == MEMORY:
            lines.append(f"{human(prediction.needed_on_host())} of main memory")
        else:
            lines.append(f"{human(prediction.total(place))} of {place}")
        lines[-1] += f" ({human(free)} free now)"
    lines += [f"{human(prediction.total(place))} of {place}" for place in prediction.missing]
    *most, last = lines
    whole = f"{', '.join(most)} and {last}" if most else last
    print(f"In all {whole}, beside activations and libraries.")
    for note in prediction.notes:
        print(f"note: {note}")


def _draw(path: str, prepared: Prepared, prediction: Prediction | None) -> None:
    from hybrimoe_plugin.cli.picture.draw import picture

    if prediction is None:
        raise ConfigError("--picture needs what explain could not predict: see above")
    title = f"{type(prepared.model).__name__} by {Path(prepared.rules.source).name}"
    text = picture(prediction, title)
    place = Path(path).resolve()  # a link stays one
    try:
        place.touch()  # with the usual permissions, which the whole file keeps
        if place.is_file():
            write_atomic(place, text)
        else:
            place.write_text(text, encoding="utf-8")
    except OSError as error:  # which names no file where a device is full
        raise OSError(error.errno, error.strerror, path) from error


def _table(
    headings: Sequence[str] | None, rows: Sequence[Sequence[str]], numbers: int | None = None
) -> None:
    """Print a table; the column `numbers` is aligned to the right."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=headings is not None)
    columns = len(headings) if headings is not None else len(rows[0])
    for index in range(columns):
        justify: Literal["left", "right"] = "right" if index == numbers else "left"
        heading = "" if headings is None else headings[index]
        # Names stay whole, for whoever searches for one.
        table.add_column(heading, overflow="fold", justify=justify, no_wrap=index == 0)
    for row in rows:
        table.add_row(*map(_plain, row))
    tables().print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    # Names from a rules file are not markup.
    return Text(printable(text))
