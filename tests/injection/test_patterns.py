"""Patterns that are searched for in another process find what `re.search` finds in this one."""

from __future__ import annotations

import re
import warnings

import pytest

from hybrimoe_plugin.injection.patterns import PatternError, search_all


def test_patterns_mean_what_re_says() -> None:
    """Other libraries read sets in sets, fuzzy counts, case folding and empty matches otherwise."""
    simple = ("b", "^b$", "a.b", r"^layers\.\d+$", "(b|a)b+", "[0-9]", "a|b", r"\w", "b?", "-")
    patterns = (
        *simple,
        "",
        "b",
        "^b$",
        "(?i)STRASSE",
        "a{1}",
        "a{e<=1}",
        "[[a]",
        r"\d+",
        r"(\w)\1",
        "(?<=a)b",
        "x*",
        "^$",
        "a.b",
    )
    names = ("", "b", "abb", "Straße", "strasse", "a{e<=1}", "[", "٣", "layers.10", "aXb", "a\nb")
    found = search_all(patterns, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found == [
            frozenset(name for name in names if re.search(pattern, name)) for pattern in patterns
        ]


def test_the_pattern_at_fault_is_named_by_its_place() -> None:
    for patterns, place in (
        (["a", "("], 1),
        (["a{99999999999}", "b"], 0),
        (["a", "b", "(a+)+$"], 2),
    ):
        with pytest.raises(PatternError) as caught:
            search_all(patterns, ["a" * 60 + "!"])
        assert caught.value.index == place
