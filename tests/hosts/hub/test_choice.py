"""Which files of a repository a name means."""

from __future__ import annotations

import pytest

from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.hosts.hub.choice import checked_files, choose, parse

QUANTISED = [
    "README.md",
    "a-Q4_K_M.gguf",
    "a-Q4_K_S.gguf",
    "a-UD-Q4_K_M.gguf",
    "a-IQ4_XS.gguf",
    "mmproj-a-F16.gguf",
    "imatrix.gguf",
    "Q8_0/a-Q8_0-00001-of-00002.gguf",
    "Q8_0/a-Q8_0-00002-of-00002.gguf",
]


def chosen(name: str, files: list[str]) -> list[str]:
    choice = choose(parse(name), checked_files((file, 10) for file in files))
    return [file.name for file in choice.files]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("Q4_K_M", ["a-Q4_K_M.gguf"]),
        ("q4_k_m", ["a-Q4_K_M.gguf"]),
        ("UD-Q4_K_M", ["a-UD-Q4_K_M.gguf"]),
        ("IQ4_XS", ["a-IQ4_XS.gguf"]),
        ("a-Q4_K_S.gguf", ["a-Q4_K_S.gguf"]),
        ("Q8_0", QUANTISED[-2:]),
        ("Q8_0/a-Q8_0-00002-of-00002.gguf", QUANTISED[-2:]),
    ],
)
def test_a_quantisation_or_a_file(wanted: str, found: list[str]) -> None:
    assert chosen(f"org/name:{wanted}", QUANTISED) == found


def test_one_model_needs_no_more() -> None:
    assert chosen("org/name", ["config.json", "a-F16.gguf", "mmproj.gguf"]) == ["a-F16.gguf"]
    assert chosen("https://huggingface.co/org/name/", ["b.gguf"]) == ["b.gguf"]


def test_several_models_are_listed_with_sizes() -> None:
    with pytest.raises(ConfigError, match=r"5 models that fit.*\(20 B\).*a-Q4_K_M.gguf \(10 B\)"):
        chosen("org/name", QUANTISED)
    with pytest.raises(ConfigError, match=r"no model 'Q5_K_M'.*it has Q8_0/a-Q8_0.gguf"):
        chosen("org/name:Q5_K_M", QUANTISED)
    # Half of a quantisation's name is no quantisation.
    with pytest.raises(ConfigError, match="no model 'Q4_K'"):
        chosen("org/name:Q4_K", QUANTISED)


def test_a_checkpoint_is_fetched_without_its_copies() -> None:
    needed = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    more = ["README.md", "consolidated.safetensors", "original/model.safetensors", "model.bin"]
    assert chosen("org/name", needed + more) == needed
    with pytest.raises(ConfigError, match="no GGUF file, and no safetensors"):
        chosen("org/name", more)


def test_missing_parts_are_noticed() -> None:
    with pytest.raises(WeightsError, match="has 1 of 2 parts"):
        chosen("org/name:Q8_0", QUANTISED[:-1])


@pytest.mark.parametrize(
    "name", ["", "name", "a/b/c", "../x", "a/..", "org/na me", "-x/y", "a/b\0"]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match="expected ORG/REPO"):
        parse(name)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("../../a.gguf", 1),
        ("/etc/a.gguf", 1),
        ("a//b.gguf", 1),
        ("a\\..\\b.gguf", 1),
        ("a\x1b[2J.gguf", 1),
        ("C:a.gguf", 1),
        (None, 1),
        ("a.gguf", None),
        ("a.gguf", -1),
        ("a.gguf", True),
        ("a.gguf", 1 << 60),
        ("a.gguf", "9"),
    ],
)
def test_hostile_lists_are_refused(name: object, size: object) -> None:
    with pytest.raises(WeightsError, match="the repository lists"):
        checked_files([(name, size)])


def test_endless_lists_are_refused() -> None:
    with pytest.raises(WeightsError, match="more than"):
        checked_files((f"{index}.gguf", 1) for index in range(10**9))
