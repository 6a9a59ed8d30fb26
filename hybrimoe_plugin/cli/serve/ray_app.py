"""A builder of the application for Ray Serve's own tools, `serve run` and `serve deploy`.

    serve run hybrimoe_plugin.cli.serve.ray_app:app gguf_path=/models/model.gguf replicas=2

Arguments are flags of `hybrimoe serve` without the dashes. Where it listens is Ray's matter: `host`
and `port` mean nothing here.
"""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.cli.flags import Parser, underscored
from hybrimoe_plugin.cli.hub.names import resolve
from hybrimoe_plugin.cli.serve import command, flags, scaling


def app(arguments: dict[str, Any]) -> Any:
    """The application for the cluster that this process is connected to.

    Raises:
        ConfigError: an argument is unknown or contradicts another, or the cluster has not what the
            replicas need.
    """
    from hybrimoe_plugin.serve.http.layers import Access

    parser = Parser(prog="hybrimoe serve", allow_abbrev=False)
    parser.set_defaults(verbose=False)  # a flag of all commands
    command.add_arguments(parser)
    given = [f"--{name}={value}" for name, value in arguments.items()]
    args = parser.parse_args(underscored(given))
    resolve(args, may_fetch=False)
    return scaling.application(args, Access(None, flags.keys(args), flags.origins(args)))
