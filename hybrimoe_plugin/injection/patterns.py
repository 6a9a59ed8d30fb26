"""Search with regular expressions from rules files, within limits of time and memory.

Some patterns take practically forever on names of ordinary length, and Python's `re` cannot be
interrupted. So they run in a separate process, which the operating system ends at its limits.
Starting it takes a few dozen milliseconds; patterns so simple that they cannot take long, as most
are, run without it. Either way a pattern means what it means to `re.search`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from hybrimoe_plugin.errors import RulesError

CPU_SECONDS = 2
"""Processor time for all patterns of a rules file; ordinary ones take milliseconds."""
WALL_SECONDS = 30
"""Wall-clock limit, for a machine too busy to give the process its processor time."""
MEMORY_BYTES = 512 << 20
MAX_LENGTH = 4096
"""Limit of characters in a pattern; those of kTransformers' own rules have up to 200."""

_SIMPLE = re.compile(r"(?:\\[.dw]|\[[\w-]+\]|[\w.^$|()-]|(?<![()|^+*?])[+*?])+")
"""Characters, sets and repetitions of these; no repeated group and no repeated repetition."""
_MOST_REPETITIONS = 2
_MOST_GROUPS = 1
"""Limits for a simple pattern: search time grows with a power of either number."""

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
"""Indices of the names that a pattern matches, or what is wrong with the pattern."""


class PatternError(RulesError):
    """A pattern that cannot be used; `index` is its position among the given ones."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(problem)
        self.index = index


def search_all(patterns: Sequence[str], names: Sequence[str]) -> list[frozenset[str]]:
    """The names that each pattern matches by `re.search`; without names, only compile patterns.

    Raises:
        PatternError: a pattern is no regular expression, is too long, or takes too much time or
            memory.
    """
    for index, pattern in enumerate(patterns):
        if len(pattern) > MAX_LENGTH:
            raise PatternError(index, f"is longer than {MAX_LENGTH} characters")
    found: dict[int, Result] = {}
    others = []
    for index, pattern in enumerate(patterns):
        if _is_simple(pattern):
            found[index] = _search(pattern, names)
        else:
            others.append(index)
    if others:
        results = _run([patterns[index] for index in others], names)
        # Results are missing from the pattern on that used up the limits.
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


def _run(patterns: Sequence[str], names: Sequence[str]) -> list[Result]:
    """Results from a separate process; fewer than patterns if the process was ended."""
    command = [sys.executable, "-I", "-S", "-c", _WORKER]
    given = json.dumps([patterns, names]).encode()
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, timeout=WALL_SECONDS, check=False
        )
        written = done.stdout
    except subprocess.TimeoutExpired as ended:
        written = ended.stdout or b""
    except OSError as error:
        reason = error.strerror or error
        raise RulesError(f"cannot start Python to search for patterns: {reason}") from error
    whole, _, _ = written.rpartition(b"\n")
    return [json.loads(line) for line in whole.decode().splitlines()]
