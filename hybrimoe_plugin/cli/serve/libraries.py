"""The libraries of the server, which are an extra of this package."""

from __future__ import annotations

import importlib.util

from hybrimoe_plugin.errors import ConfigError

LIBRARIES = ("fastapi", "llguidance", "openai", "prometheus_client", "uvicorn")
"""What the extra `serve` brings."""

REMEDY = "pip install 'ktransformers-hybrimoe[serve]'"


def missing() -> list[str]:
    """Those that are not there."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def check() -> None:
    """Raises: ConfigError: some are not installed; it says how to install them."""
    absent = missing()
    if absent:
        raise ConfigError(f"the server needs {', '.join(absent)}: {REMEDY}")
