"""Regular expressions from rules files, compiled and searched under limits of time and memory.

Some patterns take longer than any patience, on names of ordinary length, and Python's `re` cannot
be told to stop. So it runs in a process of its own, which the operating system ends at its limits.
That takes a few dozen milliseconds, which patterns of the usual kind are spared: those so simple
that they cannot take long. Every pattern means what `re.search` says.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from hybrimoe_plugin.errors import RulesError

CPU_SECONDS = 2
"""Processor time for all patterns of a rules file; ordinary ones take some milliseconds on a model
of any size.
"""
WALL_SECONDS = 30
"""For a machine so busy that the process does not get its processor time."""
MEMORY_BYTES = 512 << 20
MAX_LENGTH = 4096
"""Characters of a pattern; those of kTransformers' own rules have up to 200."""

_SIMPLE = re.compile(r"(?:\\[.dw]|\[[\w-]+\]|[\w.^$|()-]|(?<![()|^+*?])[+*?])+")
"""Letters, sets of letters and repetitions of these; none of a group, none of a repetition."""
_MOST_REPETITIONS, _MOST_GROUPS = 2, 1
"""In a simple pattern: time grows with a power of their number."""

_WORKER = f"""
import json, re, sys, warnings
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, ValueError, OSError):
    pass
warnings.simplefilter("ignore")
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        search = re.compile(pattern).search
        found = [index for index, name in enumerate(names) if search(name) is not None]
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        found = str(error) or type(error).__name__
    print(json.dumps(found), flush=True)
"""


Result = list[int] | str
"""The places of the names in which a pattern is found, or what is wrong with it."""


class PatternError(RulesError):
    """A pattern that cannot be used; `index` is its place among those that were given."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(problem)
        self.index = index


def search_all(patterns: Sequence[str], names: Sequence[str]) -> list[frozenset[str]]:
    """For each pattern, the names in which `re.search` finds it; without names the patterns are
    only compiled.

    Raises:
        PatternError: a pattern is no regular expression, is too long, or takes too much time or
            memory.
    """
    for index, pattern in enumerate(patterns):
        if len(pattern) > MAX_LENGTH:
            raise PatternError(index, f"is longer than {MAX_LENGTH} characters")
    found = {
        index: _search(pattern, names)
        for index, pattern in enumerate(patterns)
        if _is_simple(pattern)
    }
    others = [index for index in range(len(patterns)) if index not in found]
    results = _run(json.dumps([[patterns[index] for index in others], names])) if others else []
    found.update(zip(others, results, strict=False))
    matches = []
    for index in range(len(patterns)):
        if index not in found:
            raise PatternError(
                index, "takes too long to search for: write it without a repetition of repetitions"
            )
        result = found[index]
        if isinstance(result, str):
            raise PatternError(index, f"is not a regular expression: {result}")
        matches.append(frozenset(names[place] for place in result))
    return matches


def _is_simple(pattern: str) -> bool:
    repetitions = sum(map(pattern.count, "+*?"))
    few = repetitions <= _MOST_REPETITIONS and pattern.count("(") <= _MOST_GROUPS
    return few and _SIMPLE.fullmatch(pattern) is not None


def _search(pattern: str, names: Sequence[str]) -> Result:
    try:
        search = re.compile(pattern).search
    except re.error as error:
        return str(error)
    return [index for index, name in enumerate(names) if search(name) is not None]


def _run(given: str) -> list[Result]:
    """The worker's results, fewer than there are patterns where it was ended."""
    command = [sys.executable, "-I", "-S", "-c", _WORKER]
    try:
        done = subprocess.run(
            command, input=given.encode(), capture_output=True, timeout=WALL_SECONDS, check=False
        )
        written = done.stdout
    except subprocess.TimeoutExpired as ended:
        written = ended.stdout or b""
    except OSError as error:
        raise RulesError(
            f"cannot start Python to search for patterns: {error.strerror or error}"
        ) from error
    whole, _, _ = written.rpartition(b"\n")
    return [json.loads(line) for line in whole.decode().splitlines()]
