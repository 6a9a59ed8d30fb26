"""Flags of `hybrimoe serve` that are not about loading the model."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from hybrimoe_plugin.cli.flags import add_flag, add_switch, number, path, size, whole
from hybrimoe_plugin.config import DEMO_FORMS
from hybrimoe_plugin.errors import ConfigError

KEY_VARIABLE = "HYBRIMOE_API_KEY"

SYNONYMS = {
    "a": "served_model_name",
    "alias": "served_model_name",
    "allowed_origins": "cors",
    "max_model_len": "context",
    "max_num_seqs": "max_batch",
    "np": "max_batch",
    "parallel": "max_batch",
    "timeout": "request_timeout",
}
"""Flags of llama.cpp's server and vLLM's -> ours."""

_LONGEST = 30 * 24 * 3600.0
"""Seconds."""
_PACK = "target.lever"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names the model without a flag."""
    parser.add_argument(
        "model",
        nargs="?",
        type=path,
        metavar="MODEL",
        help="GGUF file, directory, flash pack, or name on the Hugging Face hub, without a flag in "
        "front; default: the demo model",
    )


def add_address(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say where to serve, and for whom."""
    add_flag(
        group,
        "host",
        metavar="TEXT",
        default="127.0.0.1",
        help="address or name to listen on; 0.0.0.0 for all of this machine's (default 127.0.0.1: "
        "only programs on this machine)",
    )
    add_flag(
        group,
        "port",
        type=whole(0, 65535),
        metavar="N",
        default=8000,
        help="port to listen on; 0 for one that is free (default 8000)",
    )
    add_flag(
        group,
        "api_key",
        action="append",
        metavar="TEXT",
        help="key that clients must send; may be given several times. Better in the environment "
        f"variable {KEY_VARIABLE}, separated by commas: other users can see flags",
    )
    add_flag(
        group,
        "served_model_name",
        metavar="TEXT",
        help="name of the model for clients (default: of its file, or its name on the hub)",
    )
    add_flag(
        group,
        "cors",
        action="append",
        metavar="TEXT",
        help="origin of web pages that may use the server, such as https://example.org, or * for "
        "all; may be given several times (default: only the server's own page)",
    )


def add_limits(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how much is done at once, and for how long."""
    add_flag(
        group,
        "max_batch",
        type=whole(1, 1024),
        metavar="N",
        default=8,
        help="answers that are computed at once (default 8)",
    )
    add_flag(
        group,
        "max_queue",
        type=whole(1, 1_000_000),
        metavar="N",
        default=256,
        help="requests that may wait for them; more are refused with status 429 (default 256)",
    )
    add_flag(
        group,
        "kv_bytes",
        type=size,
        metavar="BYTES",
        help="memory for the KV caches of running answers; default: by what is free",
    )
    add_flag(
        group,
        "prefix_cache_bytes",
        type=size,
        metavar="BYTES",
        help="memory for the beginnings of conversations, which are then not computed again; 0 for "
        "none; default: a tenth of what is free, at most 4GiB",
    )
    add_flag(
        group,
        "max_body_bytes",
        type=size,
        metavar="BYTES",
        default="8MiB",
        help="largest body of a request (default 8MiB)",
    )
    add_flag(
        group,
        "request_timeout",
        type=number(0.001, _LONGEST),
        metavar="SECONDS",
        help="longest time from a request to the end of its answer; default: no limit",
    )
    add_flag(
        group,
        "shutdown_seconds",
        type=number(0, _LONGEST),
        metavar="SECONDS",
        default=30.0,
        help="time for running answers when the server is told to end (default 30)",
    )
    add_switch(group, "log_requests", "print a line for each request (default on)", True)
    add_switch(group, "quiet", "print the address and errors alone")


def place_model(args: argparse.Namespace) -> None:
    """Put the positional MODEL where the flag for its kind would have. Mutates `args`.

    Raises:
        ConfigError: a flag names another model.
    """
    if args.model is None:
        return
    for flag in ("gguf_path", "model_path", "flash_pack"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"{args.model} and --{flag} both name the model: give one of them")
    setattr(args, _kind(Path(args.model)), args.model)


def _kind(model: Path) -> str:
    """The flag for this kind of model; that of GGUF files says what is wrong with others."""
    if not model.is_dir():
        return "gguf_path"
    if (model / _PACK).is_file():
        return "flash_pack"
    has_gguf = any(file.suffix.lower() == ".gguf" for file in model.iterdir())
    return "gguf_path" if has_gguf else "model_path"


def keys(args: argparse.Namespace) -> tuple[str, ...]:
    """The keys of flags and environment.

    Raises:
        ConfigError: one that no client could send in a header.
    """
    found = [("--api_key", key) for key in args.api_key or ()]
    for key in os.environ.get(KEY_VARIABLE, "").split(","):
        if key.strip():
            found.append((KEY_VARIABLE, key.strip()))
    for where, key in found:
        is_plain = key.isascii() and key.isprintable() and " " not in key
        if not key or not is_plain:
            raise ConfigError(f"{where}: a key has letters, digits and signs of ASCII, no spaces")
    return tuple(dict.fromkeys(key for _, key in found))


def origins(args: argparse.Namespace) -> tuple[str, ...]:
    """The origins of `--cors`.

    Raises:
        ConfigError: one that no browser would send.
    """
    for origin in args.cors or ():
        scheme, colon, name = origin.partition("://")
        is_origin = scheme in ("http", "https") and colon and name and "/" not in name
        if origin != "*" and not is_origin:
            raise ConfigError(
                f"--cors {origin!r}: expected an origin such as https://example.org, without a "
                "path, or *"
            )
    return tuple(args.cors or ())


def served_name(args: argparse.Namespace) -> str:
    """What clients call the model.

    Raises:
        ConfigError: an empty name, or one that does not print.
    """
    given: str | None = args.served_model_name
    if given is not None:
        if not given.strip() or not given.isprintable():
            raise ConfigError(f"--served_model_name {given!r}: expected a name that can be printed")
        return given
    on_hub: str | None = getattr(args, "hub_name", None)
    if on_hub is not None:
        return on_hub
    named = args.gguf_path or args.model_path or args.flash_pack
    if named is None:
        return f"demo-{args.demo or DEMO_FORMS[0]}"
    file = Path(named).resolve()
    name = file.name.removesuffix(".gguf")
    return name if name.isprintable() and name else "model"


def prefix_bytes(given: int | None, free_bytes: int) -> int:
    """Memory for kept prefixes, of so much that is free."""
    if given is not None:
        return given
    return min(4 << 30, math.floor(free_bytes / 10))
