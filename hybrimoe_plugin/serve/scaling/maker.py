"""How a replica comes by its application."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from starlette.types import ASGIApp

from hybrimoe_plugin.errors import ConfigError

MakeApp = Callable[[Any, int], AbstractContextManager[ASGIApp]]
"""(arguments, threads) -> the application, within `with`; the model is loaded for so long.

A number of threads in the arguments goes first. Called once in each replica's process.
"""


@dataclass(frozen=True)
class Maker:
    """A function that makes the application, by name: replicas run in other processes.

    Attributes:
        function: `module:name` of a `MakeApp`.
        arguments: for the function; they are pickled.
    """

    function: str
    arguments: Any

    def find(self) -> MakeApp:
        """Import the function.

        Raises:
            ConfigError: there is no such function.
        """
        module, _, name = self.function.partition(":")
        try:
            found: MakeApp = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"no function {self.function}: {error}") from None
        return found

    def make(self, threads: int) -> AbstractContextManager[ASGIApp]:
        """The application, with the model loaded."""
        return self.find()(self.arguments, threads)
