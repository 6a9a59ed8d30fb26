"""A misspelt name is blamed on who wrote it, and the nearest right one is suggested."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import tiny

from hybrimoe_plugin import load_model
from hybrimoe_plugin.errors import ConfigError, RulesError
from hybrimoe_plugin.families.packaged_rules import packaged_names, rules_path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("misspelt"), "mixtral")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cache_ration": 0.3}, "load_model: unknown setting cache_ration; did you mean cache_ratio?"),
    ({"frequency": 1}, "load_model: unknown setting frequency; known: scheduler, "),
    ({"cache_ratio": 3}, "load_model: cache_ratio: expected 0.0 to 1.0, found 3"),
    ({"scheduler": "hybrimo"}, "found 'hybrimo'; did you mean hybrimoe?"),
    ({"generate_device": "gpu"}, "generate_device: expected cpu, cuda, cuda:N or auto"),
]


def shown(error: Exception) -> str:
    """What Python prints of an error."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(("settings", "said"), WRONG)
def test_settings_of_load_model(mixtral: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(None, mixtral, progress=False, **settings)
    assert said in str(caught.value)
    assert ".yaml" not in str(caught.value)
    assert shown(caught.value).count("Traceback") == 1


def test_kwargs_of_a_rules_file(mixtral: Path, tmp_path: Path) -> None:
    rules = tmp_path / "mine.yaml"
    text = rules_path("Mixtral", None).read_text()
    rules.write_text(text.replace("      cache: adaptive\n", "      cach: adaptive\n"))
    line = text.splitlines().index("      cache: adaptive") + 1
    with pytest.raises(RulesError) as caught:
        load_model(None, mixtral, rules, progress=False)
    assert str(caught.value) == (
        f"{rules}:{line}: kwargs of rule 2: unknown setting cach; did you mean cache?"
    )
    assert shown(caught.value).count("Traceback") == 1


def test_names_of_packaged_rules(mixtral: Path) -> None:
    with pytest.raises(RulesError) as caught:
        load_model(None, mixtral, "mixtrall", progress=False)
    assert "packaged are Any-MoE, DeepSeek-V2, DeepSeek-V2-Lite, " in str(caught.value)
    assert str(caught.value).endswith("; did you mean Mixtral?")
    names = packaged_names()
    assert "multi-gpu/Mixtral-2-gpus" in names
    assert all(rules_path(name, None).is_file() for name in names)


def test_rules_of_another_family_are_named(mixtral: Path) -> None:
    with pytest.raises(RulesError) as caught:
        load_model(None, mixtral, "Qwen3-MoE", progress=False)
    assert "these rules are for qwen3_moe, the model is mixtral; --rules Mixtral is for it" in str(
        caught.value
    )
