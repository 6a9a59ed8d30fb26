"""The error types: one base class and few children.

A message says what was asked, what was found and what to do. The command line turns every
`HybriMoEError` into one line on stderr and exit code 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class HybriMoEError(Exception):
    """Base class of every error that this project raises on purpose."""


class ConfigError(HybriMoEError):
    """A setting is unknown, of the wrong type or outside its allowed range."""


class RulesError(HybriMoEError):
    """A rules file cannot be read or does not fit the model.

    The message names the file, the line and what was found.
    """


class WeightsError(HybriMoEError):
    """A weights file is missing, damaged, of another architecture or of unsupported types."""


class BudgetError(HybriMoEError):
    """A memory budget cannot be met; raised before anything is loaded."""


class BackendError(HybriMoEError):
    """A compute backend is not installed, does not work here, or cannot do what was asked."""


def not_computed(error: Exception) -> BackendError:
    """What is said of an answer that a library failed to compute, by an error of any kind."""
    kind = type(error).__name__
    return BackendError(f"the answer could not be computed: {kind}: {error}")


class InputError(HybriMoEError, ValueError, IndexError):
    """A tensor given to a model or an operator has the wrong type, shape or values.

    Also a `ValueError` and an `IndexError`, which callers of torch's own modules may expect.
    """


class ProfileError(HybriMoEError):
    """A machine profile is damaged, of another format version or of another expert shape."""


class TraceError(HybriMoEError):
    """A routing trace is damaged, truncated or of another model."""


class FlashError(HybriMoEError):
    """A flash pack is damaged, of another model or version, or cannot be written."""


class SpeculationError(HybriMoEError):
    """A draft does not fit the target: tokenizer, context length or training state."""


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """The end of a message about a misspelt name: `; did you mean scheduler?`, or nothing.

    Case and the choice between dash and underscore do not count as differences.
    """
    plain = {_plain(name): name for name in known}
    close = get_close_matches(_plain(found[:60]), plain, n=1, cutoff=0.6)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
