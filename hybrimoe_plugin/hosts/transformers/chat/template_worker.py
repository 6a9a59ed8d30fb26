"""Renders chat templates in a process of its own, with limits on time and memory.

Started by `template`, as a script: it imports nothing but jinja2. Templates see what transformers
shows them. One request and one answer a line, both JSON in ASCII.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 16 * 2**20
"""Of a rendered conversation."""


class Generation(Extension):
    """`{% generation %}` marks the model's words for training; here its contents are plain text."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Dict:
    """The `dict` of a template: calls make one; other attributes of the class are out of reach."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox with what chat templates expect."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    made.globals["dict"] = Dict()
    return made


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Refused(Exception):
    """A template's own words, by `raise_exception`."""


def _raise_exception(message: Any) -> None:
    raise Refused(str(message))


def answer(request: dict[str, Any]) -> dict[str, str]:
    """`text`, or `kind` and `error`."""
    try:
        text = environment().from_string(request["template"]).render(**request["variables"])
        return (
            {"text": text}
            if len(text) <= MAX_CHARACTERS
            else {"kind": "long", "error": str(len(text))}
        )
    except Refused as error:
        return {"kind": "refused", "error": str(error)}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "syntax", "error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"kind": "memory", "error": ""}
    except Exception as error:  # a template may raise anything
        return {"kind": "failed", "error": f"{type(error).__name__}: {error}"}


def limit(seconds: int, nbytes: int) -> None:
    """Let the system end this process when its time or memory is used up.

    The time is set anew for every request.
    """
    import resource
    import signal

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    with contextlib.suppress(ValueError, OSError):  # not every system bounds memory
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))


def main() -> None:
    seconds, nbytes = int(sys.argv[1]), int(sys.argv[2])
    for line in sys.stdin:
        limit(seconds, nbytes)
        try:
            found = json.dumps(answer(json.loads(line)))
        except MemoryError:
            found = json.dumps({"kind": "memory", "error": ""})
        print(found, flush=True)
        limit(0, nbytes)


if __name__ == "__main__":
    main()
