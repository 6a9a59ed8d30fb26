"""`hybrimoe flash_pack`, `lever-train` and chats with a target on flash, on a tiny model, end to
end.
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_plugin.cli.main import main
from lever_ext.cli.chat import _demo_pack

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
WORDS = ["<unk>", "<s>", "</s>", *(f"word{index}" for index in range(61))]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of 64 words, as the Hugging Face hub would store it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    _tokenizer(Tokenizer, models, pre_tokenizers, PreTrainedTokenizerFast, WORDS).save_pretrained(
        str(directory)
    )
    return directory


def _tokenizer(kind: Any, models: Any, splitters: Any, fast: Any, words: list[str]) -> Any:
    made = kind(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = splitters.Whitespace()
    return fast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def pack(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pack")
    assert (
        main(
            [
                "flash-pack",
                "--model_path",
                str(model_path),
                "--output",
                str(directory),
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    return directory


def chat(pack: Path, *flags: str) -> int:
    words = ["--prompt", "word1 word2 word3", "--max_new_tokens", "12", "--greedy"]
    return main(["local_chat", "--flash-pack", str(pack), *words, *flags])


def test_pack_says_where_it_is(
    pack: Path, capsys: pytest.CaptureFixture[str], model_path: Path
) -> None:
    assert (
        main(
            [
                "flash_pack",
                "--model-path",
                str(model_path),
                "--output",
                str(pack),
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.strip() == str(pack / "target.lever")


def test_chat_prints_the_answer_and_what_speculation_did(
    pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    answers = set()
    for flags in (
        ("--tree", "none"),
        ("--draft", "low-bit", "--dram_budget", "400KiB"),
        ("--draft", "ngram", "--tree", "chain", "--tree_size", "3", "--no_overlap"),
        ("--draft", "low-bit", "--draft_bits", "2", "--tree", "specinfer", "--throttle", "nvme"),
    ):
        assert chat(pack, *flags) == 0
        made = capsys.readouterr()
        said.append(made.err)
        answers.add(made.out)
    assert len(answers) == 1 and "word" in answers.pop()
    for part in ("tokens/s", "acceptance "
                             "length", "by "
                                       "position", "target "
                                                   "passes", "flash reads", "of the device's",
                 "draft ", "waiting for reads", "verify compute", "predicted"):  # fmt: skip
        assert part in said[1], part
    assert "throttled to nvme" in said[3] and "measured" in said[1]


def test_an_accelerator_changes_where_but_not_what(
    pack: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert chat(pack, "--tree", "none") == 0
    want = capsys.readouterr().out
    assert (
        chat(pack, "--device", "emulated", "--vram_budget", "64MiB", "--dram_budget", "400KiB") == 0
    )
    made = capsys.readouterr()
    assert made.out == want
    assert ("live there" in made.err) != ("emulated is not used" in caplog.text)
    assert chat(pack, "--device", "warp") == 2 and chat(pack, "--device", "emulated") == 2
    assert "cpu, cuda, cuda:N or emulated" in capsys.readouterr().err


def test_quiet_leaves_the_answer_alone(
    pack: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ("--device", "emulated", "--vram_budget", "64MiB", "--dram_budget", "400KiB")
    assert chat(pack, "--quiet", *there) == 0
    said = capsys.readouterr()
    assert said.out and said.err == ""
    monkeypatch.setattr("hybrimoe_plugin.cache_folder.found", lambda _: pack / "target.lever")
    few = ("--max_new_tokens", "3")
    assert main(["local_chat", "--draft", "ngram", "--prompt", "word1", "--quiet", *few]) == 0
    assert capsys.readouterr().err == ""


def test_a_demo_target_without_a_tokenizer_is_completed(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing was cut off at its very end."""
    kept = tmp_path / "lever" / "mixtral" / "target.lever"
    kept.parent.mkdir(parents=True)
    kept.write_bytes((pack / "target.lever").read_bytes())
    packed: list[Path] = []
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    monkeypatch.setattr("hybrimoe_plugin.cli.models.demo_gguf", lambda _form: Path("demo.gguf"))
    monkeypatch.setattr(
        "lever_ext.packing.pack_model", lambda directory, *_, **__: packed.append(directory)
    )
    assert _demo_pack("mixtral", quiet=True) == kept.parent and packed == [kept.parent]
    (kept.parent / "tokenizer.json").write_text("{}")
    assert _demo_pack("mixtral", quiet=True) == kept.parent and len(packed) == 1


def test_a_conversation_keeps_its_cache_and_stops(
    pack: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without speculation, where every prompt is computed anew."""
    assert chat(pack, "--tree", "none") == 0
    words = capsys.readouterr().out.split()
    flags = ["--greedy", "--max_new_tokens", "12", "--flash_pack", str(pack)]
    flags += ["--stop", words[4], "--repetition_penalty", "1.3"]
    said = []
    for draft in (["--tree", "none"], ["--draft", "low-bit"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("word1 word2 word3\nword4\n/retry\n"))
        assert main(["local_chat", *flags, *draft]) == 0
        made = capsys.readouterr()
        said.append(made.out)
        assert made.err.count("prompt kept:") == 2
        assert "weights: " in made.err and "on flash" in made.err
    assert said[0] == said[1] and words[4] not in said[0].split()
    first, second, again = said[0].splitlines()
    assert second == again


def test_sampling_with_a_seed_is_repeatable(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for draft in ("low-bit", "ngram"):
        flags = [
            "--draft",
            draft,
            "--prompt",
            "word5",
            "--max_new_tokens",
            "9",
            "--temperature",
            "0.8",
            "--seed",
            "3",
        ]
        assert main(["local_chat", "--flash_pack", str(pack), *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_trained_exit_is_used(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text", tmp_path / "exit.safetensors"
    text.write_text(" ".join(WORDS[3 + (7 * index) % 61] for index in range(200)))
    flags = ["--text", str(text), "--output", str(output), "--layer", "1", "--epochs", "1"]
    assert main(["lever-train", "--flash_pack", str(pack), *flags]) == 0
    made = capsys.readouterr()
    assert made.out.strip() == str(output) and "layer 1, loss" in made.err
    assert chat(pack, "--early_exit", str(output), "--tree", "fixed") == 0
    exiting = capsys.readouterr().out
    assert chat(pack, "--tree", "none") == 0
    assert exiting == capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_code_2(
    pack: Path, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "target.lever"
    damaged.write_bytes((pack / "target.lever").read_bytes()[:9000])
    cases = [
        (["local_chat", "--flash_pack", str(tmp_path / "none")], "cannot open the pack"),
        (["local_chat", "--flash_pack", str(damaged)], "truncated"),
        (["local_chat", "--flash_pack", str(pack), "--dram_budget", "1KiB"], "too small"),
        (["local_chat", "--flash_pack", str(pack), "--dram_budget", "much"], "expected a size"),
        (["local_chat", "--flash_pack", str(pack), "--draft", "nothing.gguf"], "no such file"),
        (["local_chat", "--flash_pack", str(pack), "--throttle", "warp"], "throttle"),
        (
            ["local_chat", "--flash_pack", str(pack), "--early_exit", str(damaged)],
            "early-exit predictor",
        ),
        (["local_chat", "--flash_pack", str(pack), "--scheduler", "static"], "no engine"),
        (["local_chat", "--draft", "ngram", "--model_path", str(model_path)], "flash_pack"),
        (["flash-pack", "--output", str(tmp_path / "p")], "name a model"),
        (["flash-pack", "--model_path", str(tmp_path), "--output", str(tmp_path / "p")], ""),
        (["lever-train", "--flash_pack", str(pack), "--layer", "9"], "exit layer"),
    ]
    for argv, match in cases:
        if argv[0] == "local_chat":
            argv += ["--prompt", "word1"]
        assert main(argv) == 2, argv
        complaint = capsys.readouterr().err.strip().splitlines()[-1]
        assert complaint.startswith("hybrimoe: error: ") and match in complaint, (argv, complaint)


def test_a_draft_with_another_tokenizer_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hybrimoe_plugin.errors import SpeculationError
    from lever_ext.packing import check_same_tokenizer

    kinds = (Tokenizer, models, pre_tokenizers, PreTrainedTokenizerFast)
    ours, swapped = _tokenizer(*kinds, WORDS), [*WORDS[:10], WORDS[11], WORDS[10], *WORDS[12:]]
    check_same_tokenizer(ours, _tokenizer(*kinds, WORDS))
    for theirs in (swapped, WORDS[:40]):
        with pytest.raises(SpeculationError, match="do not share a tokenizer"):
            check_same_tokenizer(ours, _tokenizer(*kinds, theirs))


def test_example_runs(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Path(__file__).parents[2] / "examples" / "lever.py"
    spec = importlib.util.spec_from_file_location("lever_example", place)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    said = example.main(pack, "400KiB", tokens=8)
    assert "word" in said and "acceptance length" in capsys.readouterr().out
