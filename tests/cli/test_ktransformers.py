"""The commands of the classic host, where it is not installed and before anything is started."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.hosts.ktransformers import install, launch, release

without_host = pytest.mark.skipif(
    find_spec("ktransformers") is not None, reason="ktransformers is installed here"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DeepseekV2ForCausalLM"]}))
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[launch.Launch]:
    """What would have been started."""
    found: list[launch.Launch] = []
    monkeypatch.setattr(launch, "run_local_chat", lambda started, loaded: found.append(started))
    return found


def chat(model: Path, *flags: str) -> int:
    return main(
        ["ktransformers_chat", "--model_path", str(model), "--gguf_path", str(model), *flags]
    )


def test_our_rules_and_no_cuda_graphs_by_default(model: Path, started: list[launch.Launch]) -> None:
    assert chat(model, "--prompt", "Hello", "--max-new-tokens", "7", "--greedy") == 0
    flags = started[0].flags
    assert Path(flags["optimize_rule_path"]).name == "DeepSeek-V2-cpu.yaml"
    assert (
        flags["use_cuda_graph"] is False
        and flags["max_new_tokens"] == 7
        and flags["cpu_infer"] is None
    )
    assert started[0].prompt == "Hello" and started[0].greedy


def test_stock_rules_may_have_cuda_graphs(model: Path, started: list[launch.Launch]) -> None:
    assert chat(model, "--rules", "stock", "--use_cuda_graph") == 0
    assert (
        started[0].flags["optimize_rule_path"] is None
        and started[0].flags["use_cuda_graph"] is True
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--use_cuda_graph", "True"], "give --use_cuda_graph False"),
        (["--rules", "nothing.yaml"], "nothing.yaml: no such rules file"),
        (["--demo"], "--demo names the demo model"),
    ],
)
def test_refusals(
    flags: list[str],
    said: str,
    model: Path,
    started: list[launch.Launch],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert chat(model, *flags) == 2
    assert said in capsys.readouterr().err and not started


def test_models_that_it_cannot_start_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ktransformers_chat"]) == 2
    assert "give --model_path" in capsys.readouterr().err
    assert chat(tmp_path / "nowhere") == 2
    assert "nowhere: no such directory" in capsys.readouterr().err
    assert chat(tmp_path) == 2
    assert "no architecture can be read there" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    assert chat(tmp_path) == 2
    assert "no packaged rules for GPT2LMHeadModel" in capsys.readouterr().err


@without_host
@pytest.mark.parametrize("command", [["patches"], ["patches", "--json"]])
def test_without_the_host_commands_say_how_to_get_it(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    assert f"this brings it: {release.how_to_install()}" in capsys.readouterr().err


def test_prompts_as_local_chat_reads_them() -> None:
    assert launch.as_lines("What?") == "What?\n"
    assert launch.as_lines("a\nb") == '"""a\nb"""\n'
    for bad in ("", " \n", 'a\n"""b'):
        with pytest.raises(ConfigError):
            launch.as_lines(bad)


def test_rules_that_name_cuda(tmp_path: Path) -> None:
    packaged = launch.packaged_rules
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"]}))
    assert launch.names_cuda(packaged(str(tmp_path), "gpu"))
    assert not launch.names_cuda(packaged(str(tmp_path), "cpu"))


def test_install_refuses_the_default_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "installed", lambda: None)
    monkeypatch.setattr(install.metadata, "version", lambda name: "5.17.0")
    with pytest.raises(
        ConfigError, match=r"needs transformers==4.43.2, this environment has 5.17.0"
    ) as refused:
        install.install()
    assert release.how_to_install() in str(refused.value)
    monkeypatch.setattr(install, "installed", lambda: "0.3.0")
    with pytest.raises(ConfigError, match=r"ktransformers 0.3.0 is installed here"):
        install.install()
    monkeypatch.setattr(install, "installed", lambda: release.VERSION)
    assert install.install() == 0.0


def test_install_pins_the_file_and_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_options: Any) -> Any:
        calls.append((command, env))
        pinned = Path(command[command.index("--requirement") + 1]).read_text()
        assert pinned == f"ktransformers=={release.VERSION} --hash=sha256:{release.SDIST_SHA256}\n"
        return type(
            "Done", (), {"returncode": 1, "stderr": "WARNING: x\nERROR: hashes do not match\n"}
        )

    monkeypatch.setattr(install.subprocess, "run", run)
    with pytest.raises(BackendError, match="hashes do not match"):
        install._build(tmp_path)
    command, environment = calls[0]
    assert {"--require-hashes", "--no-cache-dir", "--no-deps", "--no-build-isolation"} <= set(
        command
    )
    assert (Path(environment["PYTHONPATH"]) / "sitecustomize.py").is_file()
    assert (Path(environment["HYBRIMOE_NO_CUDA_HOME"]) / "bin" / "nvcc").stat().st_mode & 0o100


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "config.json",
            {
                "model_type": "own",
                "architectures": ["MixtralForCausalLM"],
                "auto_map": {"AutoConfig": "o.C"},
            },
        ),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["o.T", None]}}),
    ],
)
def test_code_of_a_directory_is_refused(
    name: str, values: dict[str, Any], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / name).write_text(json.dumps(values))
    assert chat(model, "--prompt", "hi") == 2
    assert "auto_map" in capsys.readouterr().err


class Words:
    """A tokenizer of words, with an end of its own."""

    eos_token_id = 0
    words = ("</s>", "<|im_end|>", "<think>", "\\n", "hi", "\n", "part")

    def encode(self, text: str, **_: Any) -> list[int]:
        assert text == "<think>\\n"
        return [2, 3]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(
            self.words[index] for index in ([ids] if isinstance(ids, int) else list(ids))
        )

    def get_added_vocab(self) -> dict[str, int]:
        return {"<|im_end|>": 1}


def test_every_end_of_the_model_ends_its_answers() -> None:
    from hybrimoe_plugin.hosts.ktransformers.ending import EndingTokenizer

    loader = SimpleNamespace(gguf_file_meta={"tokenizer.ggml.eot_token_id": 6})
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=[0, 4]), gguf_loader=loader
    )
    tokenizer = EndingTokenizer.of(model, Words())
    ends = [index for index in range(7) if tokenizer.decode(torch.tensor([index])) == "<|im_end|>"]
    assert ends == [0, 1, 4, 6]
    assert tokenizer.decode([4]) == "hi" and tokenizer.eos_token_id == 0, "text is what it was"


def test_thinking_is_not_forced_twice() -> None:
    from hybrimoe_plugin.hosts.ktransformers.ending import without_second_think

    for prompt, left in (
        ([4, 2, 3], 3),
        ([4, 2, 5, 2, 3], 3),
        ([4, 2, 2, 3], 2),
        ([4, 2, 5], 3),
        ([2, 3], 2),
    ):
        assert without_second_think(Words(), torch.tensor([prompt])).shape == (1, left), prompt
