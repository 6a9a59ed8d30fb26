"""Model directories are data: nothing in them is run, fetched or asked about, whatever standard
input says.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers.pre_tokenizers import ByteLevel

from hybrimoe_plugin import load_model
from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.hosts.transformers.preparation.prepare import plan_for
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model_of

TOKENS = [*sorted(ByteLevel.alphabet()), "he", "<|end|>"]
CODE = (
    "open({mark!r}, 'w').close()\nfrom transformers import *\nclass Own({base}): model_type = "
    "'own'\n"
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 1) + [3],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.eos_token_id": len(TOKENS) - 1,
    }
    return tiny.write(
        tmp_path_factory.mktemp("gguf"), "mixtral", changes={"vocab_size": len(TOKENS)}, extra=extra
    )


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user, or a script, that answers every question with y."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A sound directory of the tiny model, with some entries of its JSON files changed and Python
    files beside.
    """

    def make(config: dict[str, Any] | None = None, tokenizer: dict[str, Any] | None = None) -> Path:
        made = tiny.config("mixtral", vocab_size=len(TOKENS))
        made.save_pretrained(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**values, **(config or {})}))
        if tokenizer is not None:
            (tmp_path / "tokenizer.json").write_text("{}")
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        for name, base in (
            ("config", "MixtralConfig"),
            ("model", "MixtralForCausalLM"),
            ("tok", "TokenizersBackend"),
        ):
            (tmp_path / f"{name}_code.py").write_text(
                CODE.format(mark=str(tmp_path / "ran"), base=base)
            )
        return tmp_path

    return make


def load(model_path: Path | None, gguf_path: Path) -> Any:
    return load_model(model_path, gguf_path, cpu_backend="torch", dtype="float32", progress=False)


OWN_TOKENIZER = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "tok_code.Own"]}}
OWN_CONFIG = {"AutoConfig": "config_code.Own", "AutoModelForCausalLM": "model_code.Own"}


@pytest.mark.usefixtures("yes")
def test_a_tokenizer_of_its_own_is_refused(folder: Callable[..., Path], gguf: Path) -> None:
    path = folder(tokenizer=OWN_TOKENIZER)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: auto_map .* never run"):
        load(path, gguf)
    assert not (path / "ran").exists()


@pytest.mark.usefixtures("yes")
def test_a_config_of_its_own_is_refused(
    folder: Callable[..., Path], gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder({"model_type": "own", "auto_map": OWN_CONFIG})
    with pytest.raises(ConfigError, match=r"config\.json: auto_map .* 'own'"):
        load(path, gguf)
    assert main(["explain", "--model_path", str(path)]) == 2
    assert "never run" in capsys.readouterr().err
    assert not (path / "ran").exists()


@pytest.mark.usefixtures("yes")
def test_code_that_nobody_needs_is_left_out(
    folder: Callable[..., Path], gguf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder({"auto_map": OWN_CONFIG})
    model, tokenizer = load(path, gguf)
    model.hybrimoe.close()
    assert type(model).__module__.startswith("transformers.") and tokenizer is not None
    assert "auto_map" in caplog.text
    assert not (path / "ran").exists()


@pytest.mark.usefixtures("yes")
def test_files_beside_a_gguf_are_not_read(folder: Callable[..., Path], gguf: Path) -> None:
    path = folder({"model_type": "own", "auto_map": OWN_CONFIG}, OWN_TOKENIZER)
    (path / "model.gguf").symlink_to(gguf)
    model, tokenizer = load(None, path / "model.gguf")
    model.hybrimoe.close()
    assert tokenizer("he").input_ids == [TOKENS.index("he")]
    assert not (path / "ran").exists()


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize(
    "name", ["AutoTokenizer", "AutoModelForCausalLM", "AutoProcessor", "MixtralForCausalLM", 7]
)
def test_a_tokenizer_class_is_a_tokenizer(
    name: Any, folder: Callable[..., Path], gguf: Path
) -> None:
    path = folder({"auto_map": OWN_CONFIG}, {"tokenizer_class": name})
    with pytest.raises(ConfigError, match="none of transformers' tokenizers"):
        load(path, gguf)
    assert not (path / "ran").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "someone/kernels"},
        {"_attn_implementation": "someone/kernels@main:fast"},
        {"_attn_implementation_internal": "someone/kernels"},
        {"experts_implementation": "someone/kernels"},
        {"per_layer_config": {"0": {"attn_implementation": "someone/kernels"}}},
        {"use_kernels": True},
        {"kernel_config": {"RMSNorm": "someone/kernels:RMSNorm"}},
        {"custom_generate": "someone/recipe"},
        {"trust_remote_code": True},
        {"tokenizer_class": "AutoTokenizer"},
        {"get_text_config": "taken"},
        {"__class__": "taken"},
    ],
)
def test_a_config_names_nothing_to_fetch(
    values: dict[str, Any], folder: Callable[..., Path], gguf: Path
) -> None:
    with pytest.raises(ConfigError, match="attn_implementation|" + "|".join(values)):
        plan_for(folder(values), gguf)
    with pytest.raises(ConfigError, match="the model's config"):
        meta_model_of({**json.loads((folder(values) / "config.json").read_text())}, torch.float32)


@pytest.mark.parametrize(
    "values",
    [
        {"output_attentions": True},
        {"return_dict": False},
        {"layer_types": ["sliding_attention", "full_attention"]},
    ],
)
def test_what_every_answer_would_fail_by_is_refused(
    values: dict[str, Any], folder: Callable[..., Path], gguf: Path
) -> None:
    with pytest.raises((ConfigError, WeightsError), match=next(iter(values))):
        load(folder(values), gguf)


def test_choices_of_transformers_own_are_the_host_s(
    folder: Callable[..., Path], gguf: Path
) -> None:
    """Directories say `flash_attention_2`; transformers would fetch a kernel where it is not
    installed.
    """
    plain = plan_for(folder(), gguf).model
    values = {"_attn_implementation": "flash_attention_2", "torch_dtype": "bfloat16"}
    found = plan_for(folder(values), gguf).model
    assert found.config._attn_implementation == plain.config._attn_implementation
    assert found.config.to_dict() == plain.config.to_dict()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "never_heard"}', "no causal language model of type 'never_heard'"),
        ('{"model_type": "llava"}', "llava"),
        ('{"model_type": "mixtral", "num_hidden_layers": 1000000000}', "more than 1024"),
    ],
)
def test_configs_that_say_nothing_sound(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=said):
        plan_for(tmp_path, None)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_pipes_and_devices_are_not_opened(
    name: str, folder: Callable[..., Path], gguf: Path
) -> None:
    path = folder(tokenizer=None if "generation" in name else {})
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with pytest.raises(WeightsError, match=f"{name}: .*not a regular file"):
        load(path, gguf)
    (path / name).unlink()
    (path / name).symlink_to("/dev/zero")
    with pytest.raises(WeightsError, match=f"{name}: .*not a regular file"):
        load(path, gguf)
