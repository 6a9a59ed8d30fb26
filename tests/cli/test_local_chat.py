"""`hybrimoe local_chat`: which flags reach the host; bad ones are refused before loading."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from hybrimoe_plugin.cli import models
from hybrimoe_plugin.cli.chat import banner, conversation
from hybrimoe_plugin.cli.chat.typed import loop
from hybrimoe_plugin.cli.main import main


class Recorder:
    """Stands in for the host, the demo builder and the conversation, and records their calls."""

    def __init__(self) -> None:
        self.load: dict[str, Any] = {}
        self.demo: list[str] = []
        self.options: Any = None
        self.answers: list[str] = []
        self.complete = True
        self.looped: list[str | None] = []
        self.model = SimpleNamespace(hybrimoe=SimpleNamespace(timeline=self.timeline))
        self.drawn: list[Path] = []

    def timeline(self, path: str) -> SimpleNamespace:
        self.drawn.append(Path(path))
        return SimpleNamespace(close=lambda: Path(path).write_text("[]"), summary=lambda: "done")

    def load_model(
        self, model_path: Any, gguf_path: Any, rules: Any, **settings: Any
    ) -> tuple[Any, str]:
        self.load = {"model_path": model_path, "gguf_path": gguf_path, "rules": rules, **settings}
        return self.model, "tokenizer"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    host = ModuleType("hybrimoe_plugin.hosts.transformers")
    vars(host)["load_model"] = recorder.load_model
    monkeypatch.setitem(sys.modules, host.__name__, host)

    def demo_gguf(form: str, rebuild: bool = False) -> Path:
        recorder.demo.append(form)
        return Path("demo.gguf")

    class Chat:
        def __init__(
            self, _model: Any, _tokenizer: Any, options: Any, _report: Any, kept: Any
        ) -> None:
            recorder.options = options

        def answer(self, content: str) -> bool:
            recorder.answers.append(content)
            return recorder.complete

    def converse(session: Any, _read: Any) -> int:
        recorder.looped.append(session.prompt_file)
        return 0

    monkeypatch.setattr(models, "demo_gguf", demo_gguf)
    monkeypatch.setattr(conversation, "Chat", Chat)
    monkeypatch.setattr(loop, "converse", converse)
    monkeypatch.setattr(banner, "banner", lambda _model: ["the \x1b[2Jmodel"])
    return recorder


def chat(flags: str) -> int:
    """Ask once with the flags."""
    return main(["local_chat", *flags.split(), "--prompt", "hi"])


def test_flags_of_ktransformers_reach_the_host(seen: Recorder) -> None:
    assert (
        chat(
            "--model_path m --gguf_path=g --optimize_config_path r.yaml --cpu_infer 3 "
            "--max_new_tokens 7"
        )
        == 0
    )
    assert seen.load == {
        "model_path": "m",
        "gguf_path": "g",
        "rules": "r.yaml",
        "dtype": None,
        "trust_rules": False,
        "progress": sys.stderr.isatty(),
        "require_tokenizer": True,
        "cpu_threads": 3,
    }
    assert seen.answers == ["hi"]
    assert (seen.options.max_new_tokens, seen.options.chunk_prefill_size) == (7, 8192)


@pytest.mark.parametrize(("accelerator", "piece"), [(None, 512), ("cuda", 8192)])
def test_pieces_of_prompts_are_short_where_the_cpu_computes(
    accelerator: str | None, piece: int, seen: Recorder
) -> None:
    """Ctrl-C waits for a piece to end; an accelerator is sent the experts for every piece."""
    seen.model.hybrimoe.engines = (SimpleNamespace(accelerator=accelerator),)
    assert chat("--gguf_path g") == 0
    assert seen.options.chunk_prefill_size == piece
    assert chat("--gguf_path g --chunk_prefill_size 100") == 0
    assert seen.options.chunk_prefill_size == 100


def test_rules_have_two_spellings(seen: Recorder) -> None:
    assert (
        main(["local_chat", "--gguf_path", "g", "--optimize_rule_path", "r.yaml", "--prompt", "hi"])
        == 0
    )
    assert seen.load["rules"] == "r.yaml"


def test_given_settings_only_are_passed_on(seen: Recorder) -> None:
    flags = "--device emulated --scheduler static --cache_ratio 0.5 --prefetch off"
    assert chat(f"--gguf_path g {flags}") == 0
    given = {"scheduler": "static", "cache_ratio": 0.5, "prefetch": "off"}
    assert seen.load["accelerator"] == "emulated"
    assert {key: seen.load[key] for key in seen.load if key in given} == given
    assert "cache" not in seen.load


def test_without_paths_it_is_the_demo_model(
    seen: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["local_chat", "--prompt", "hi"]) == 0
    assert (seen.demo, seen.load["gguf_path"]) == (["mixtral"], "demo.gguf")
    assert "demo model" in capsys.readouterr().err


def test_demo_can_be_chosen(seen: Recorder) -> None:
    assert main(["local_chat", "--demo", "qwen2moe", "--prompt", "hi"]) == 0
    assert seen.demo == ["qwen2moe"]


def test_without_prompt_it_talks(
    seen: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.txt"
    path.write_text("hello")
    assert main(["local_chat", "--demo", "--prompt_file", str(path)]) == 0
    assert seen.looped == [str(path)]
    assert capsys.readouterr().err == "the \\x1b[2Jmodel\n"
    assert main(["local_chat", "--quiet", "--timeline", str(tmp_path / "t.json")]) == 0
    assert capsys.readouterr().err == ""


def test_stops_and_penalties_reach_the_answers(seen: Recorder) -> None:
    assert chat("--demo --greedy --stop a --stop b --repetition_penalty 1.1") == 0
    assert seen.options.stops == ("a", "b")
    assert seen.options.sampling["repetition_penalty"] == 1.1
    assert chat("--demo --quiet") == 0
    assert (seen.options.stops, seen.options.sampling, seen.options.quiet) == ((), {}, True)


def test_interrupted_one_shot_exits_130(seen: Recorder) -> None:
    seen.complete = False
    assert main(["local_chat", "--demo", "--prompt", "hi"]) == 130


@pytest.mark.parametrize(
    ("flags", "sampling"),
    [
        ("", {}),
        ("--temperature 0.6 --top_p 0.95", {"temperature": 0.6, "top_p": 0.95, "do_sample": True}),
        ("--do_sample", {"do_sample": True}),
        ("--greedy", {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
        (
            "--temperature 1e-30",
            {"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
        ),
        (
            "--temperature 0",
            {"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
        ),
        (
            "--do_sample False",
            {"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
        ),
    ],
)
def test_sampling(seen: Recorder, flags: str, sampling: dict[str, Any]) -> None:
    assert main(["local_chat", "--demo", "--prompt", "hi", *flags.split()]) == 0
    assert seen.options.sampling == sampling


def test_seed_is_set(seen: Recorder) -> None:
    assert main(["local_chat", "--demo", "--prompt", "hi", "--seed", "7"]) == 0
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))


def test_timeline_is_written_and_closed(seen: Recorder, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    assert main(["local_chat", "--demo", "--prompt", "hi", "--timeline", str(path)]) == 0
    assert seen.drawn == [path]
    assert json.loads(path.read_text()) == []


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("--cache_ratio 2", "cache_ratio: expected 0.0 to 1.0"),
        ("--cache_ratio 0.5 --cache_bytes 1GiB", "both set"),
        ("--cpu_infer 2 --cpu_threads 3", "differ"),
        ("--greedy --do_sample", "exclude each other"),
        ("--demo --gguf_path g", "give one of them"),
        ("--use_cuda_graph True --graphs off", "differ: give one of them"),
        ("--device cpu --accelerator emulated", "contradict each other"),
        ("--device cuda --accelerator none", "contradict each other"),
        ("--device gpu", "expected cpu, cuda, cuda:N or emulated, found 'gpu'"),
        ("--device cuda:x", "expected cpu, cuda, cuda:N or emulated"),
        ("--tree lever --device emulated", "give --vram_budget too"),
        ("--draft lowbit", "no such file; did you mean low-bit?"),
        ("--draft gone/small.gguf", "there is no such file"),
        ("--early_exit gone", "there is no early-exit predictor of this name"),
        ("--flash_pack p --throttle nvem", "found 'nvem'; did you mean nvme?"),
        ("--dram_budget much", "--dram_budget: expected a size"),
        ("--prompt_file /nonexistent", "cannot read the prompt file"),
        ("--prompt=", "--prompt is empty"),
        ("--prompt=gr\udcfc", "the message is not UTF-8 text"),
        ("--seed 18446744073709551616 --prompt a", "from 0 to 18446744073709551615"),
        ("--seed -1 --prompt a", "from 0 to"),
        ("--stop= --prompt a", "expected a text, found none"),
        ("--stop=\udcff --prompt a", r"expected UTF-8 text, found '\udcff'"),
        ("--repetition_penalty 0 --prompt a", "expected a number from 0.01 to 100"),
        ("--temperature nan --prompt a", "expected a number from 0 to 100"),
        ("--top_p inf --prompt a", "expected a number from 0 to 1"),
        ("--timeline /nonexistent/t.json", "/nonexistent/t.json: No such file"),
        ("--timeline=", "--timeline: expected a path, found an empty text"),
        ("--gguf_path=", "--gguf_path: expected a path"),
        ("--flash_pack=", "--flash_pack: expected a path"),
        ("--draft=", "--draft: expected a path"),
        ("--profile=", "--profile: expected a path"),
        ("--cpu_infer 99999999999", "--cpu_infer: expected a whole number from 1 to 1024"),
    ],
)
def test_bad_flags_are_refused_before_loading(
    seen: Recorder, capsys: pytest.CaptureFixture[str], flags: str, found: str
) -> None:
    assert main(["local_chat", *flags.split()]) == 2
    err = capsys.readouterr().err
    assert "error: " in err and "Traceback" not in err
    assert found in err
    assert seen.load == {}
    assert seen.demo == []


def test_answers_longer_than_the_context_are_refused_before_loading(
    seen: Recorder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tiny.write(tmp_path, "mixtral")
    context = tiny.config("mixtral").max_position_embeddings
    assert chat(f"--gguf_path {path} --max_new_tokens {context}") == 2
    err = capsys.readouterr().err
    assert f"answers may have {context} tokens, and the model's context has {context}" in err
    assert seen.load == {}
    assert chat(f"--gguf_path {path} --max_new_tokens {context - 1}") == 0


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is not there")


@NO_CUDA
@pytest.mark.parametrize(
    "flags",
    [
        "--device cuda",
        "--device cuda:1 --gguf_path g",
        "--accelerator cuda",
        "--draft ngram --device cuda",
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(
    seen: Recorder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
) -> None:
    monkeypatch.setattr("lever_ext.cli.chat._demo_pack", lambda _form: pytest.fail("packs"))
    assert chat(flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("hybrimoe: error: device cuda") and "use --device cpu" in err
    assert (seen.load, seen.demo) == ({}, [])
