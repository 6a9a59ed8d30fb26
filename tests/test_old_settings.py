"""Settings of the last release: what they mean today, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from hybrimoe_plugin import config
from hybrimoe_plugin.config import OLD_SETTINGS, Settings, current_settings
from hybrimoe_plugin.errors import ConfigError, RulesError
from hybrimoe_plugin.injection.match import Match, plan_injection, with_settings
from hybrimoe_plugin.injection.rules import parse_rules


@pytest.fixture(autouse=True)
def unnoticed() -> Iterator[None]:
    """Notices are given once in a process; each test sees its own."""
    config._notice_once.cache_clear()
    yield
    config._notice_once.cache_clear()


MEANINGS: list[tuple[dict[str, str], dict[str, str]]] = [
    ({"linears": "auto"}, {"dense": "auto"}),
    ({"linears": "quantised"}, {"dense": "quantised"}),
    ({"linears": "plain"}, {"dense": "dequantised"}),
    ({"dense": "lean"}, {"dense": "auto"}),
    ({"dense": "lean", "linears": "quantised"}, {"dense": "quantised"}),
    ({"dense": "lean", "linears": "plain"}, {"dense": "dequantised"}),
    ({"dense": "plain", "linears": "auto"}, {"dense": "plain"}),
    ({"dense": "plain", "linears": "plain"}, {"dense": "plain"}),
    ({"dense": "quantised", "linears": "quantised"}, {"dense": "quantised"}),
    ({"cuda_graphs": "off"}, {"graphs": "off"}),
    ({"cpu_graphs": "off"}, {"graphs": "off"}),
    ({"cuda_graphs": "auto", "cpu_graphs": "auto"}, {"graphs": "auto"}),
    ({"cuda_graphs": "off", "cpu_graphs": "auto"}, {"graphs": "off"}),
    ({"cuda_graphs": "auto", "cpu_graphs": "off"}, {"graphs": "off"}),
    ({"cpu_graphs": "off", "graphs": "off"}, {"graphs": "off"}),
]
"""What was written -> what it means today."""

CONTRADICTIONS = [
    ({"linears": "quantised", "dense": "plain"}, "linears=quantised and dense=plain"),
    ({"linears": "plain", "dense": "quantised"}, "linears=plain and dense=quantised"),
    ({"linears": "auto", "dense": "dequantised"}, "linears=auto and dense=dequantised"),
    ({"cuda_graphs": "auto", "graphs": "off"}, "cuda_graphs=auto and graphs=off"),
]


@pytest.mark.parametrize(("old", "new"), MEANINGS)
def test_old_names_mean_what_they_meant(old: dict[str, str], new: dict[str, str]) -> None:
    assert current_settings(old) == new
    assert Settings.of(old) == Settings(**old) == Settings.of(new)


@pytest.mark.parametrize(("values", "found"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name(values: dict[str, str], found: str) -> None:
    for make in (Settings.of, lambda values: Settings(**values)):
        with pytest.raises(ConfigError, match=f"{found} contradict each other: give only"):
            make(values)


def test_values_that_old_settings_never_had_are_refused() -> None:
    for old in OLD_SETTINGS:
        for value in ("lean", "dequantised", 1, None):
            with pytest.raises(ConfigError, match=f"{old.name}: expected"):
                Settings.of({old.name: value})


def test_one_notice_says_how_to_write_it_today(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        Settings.of({"linears": "plain", "cpu_graphs": "off", "cache": "lru"})
    assert caplog.messages == [
        "linears=plain is now dense=dequantised: the next release will refuse the old name",
        "cpu_graphs=off is now graphs=off: the next release will refuse the old name",
    ]


def test_current_names_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    Settings(dense="plain", graphs="off")
    assert current_settings({"dense": "plain", "unknown": 1}) == {"dense": "plain", "unknown": 1}
    assert not caplog.messages


RULES = r"""
- match: {name: head}
  replace:
    class: hybrimoe_plugin.operators.linear.QuantizedLinear
    kwargs:
      generate_device: cpu
      KWARGS
"""


def plan(kwargs: str) -> list[Match]:
    model = nn.ModuleDict({"head": nn.Linear(1, 1)})
    return plan_injection(model, parse_rules(RULES.replace("KWARGS", kwargs), "r.yaml"))


def kwargs_of(matches: list[Match]) -> dict[str, Any]:
    (match,) = matches
    return dict(match.kwargs)


def test_rules_may_use_old_names(caplog: pytest.LogCaptureFixture) -> None:
    found = plan("linears: plain")
    assert kwargs_of(found) == {"generate_device": "cpu", "dense": "dequantised"}
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("given", [{"dense": "plain"}, {"graphs": "off"}, {"cpu_graphs": "off"}])
def test_settings_override_rules_whatever_their_names(given: dict[str, Any]) -> None:
    found = kwargs_of(with_settings(plan("linears: quantised"), given))
    expected = {"generate_device": "cpu", "dense": "quantised", **current_settings(given)}
    assert found == expected


def test_contradicting_rules_name_the_line() -> None:
    found = "r.yaml:7: kwargs of rule 1: linears=quantised and dense=plain contradict each other"
    with pytest.raises(RulesError, match=found):
        plan("linears: quantised\n      dense: plain")
