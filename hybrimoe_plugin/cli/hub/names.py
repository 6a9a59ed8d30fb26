"""Names of models on the hub where a path is expected."""

from __future__ import annotations

import argparse
import os

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.errors import ConfigError

_FLAGS = ("model", "gguf_path", "model_path")


def resolve(args: argparse.Namespace, may_fetch: bool) -> None:
    """Put paths in the place of names, and the name into `hub_name`. Mutates `args`.

    A path that exists, or whose folder does, is no name.

    Args:
        may_fetch: whether what is not in the hub's cache is fetched.

    Raises:
        HybriMoEError: as `find_model`.
    """
    for flag in _FLAGS:
        text = getattr(args, flag, None)
        if isinstance(text, str) and _is_name(text):
            from hybrimoe_plugin.hosts.hub.fetch import find_model

            args.hub_name = text
            setattr(args, flag, str(find_model(text, notice, may_fetch=may_fetch)))


def _is_name(text: str) -> bool:
    from hybrimoe_plugin.hosts.hub.choice import parse

    if os.path.lexists(text) or os.path.exists(os.path.dirname(text)):
        return False
    try:
        parse(text)
    except ConfigError:
        return False  # what reads the path says what is wrong
    return True
