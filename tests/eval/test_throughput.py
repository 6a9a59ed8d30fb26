"""eval.throughput, fidelity, all: files of the right shape, ratios, reports; nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from eval import all as every
from eval import fidelity, throughput
from eval.models import forced, synthetic
from eval.peers import peer, roofline
from hybrimoe_plugin import load_model
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.replay.trace import Call, TraceHeader, write_trace
from hybrimoe_plugin.weights.gguf_store import GGUFStore


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0"])
def test_random_blocks_have_the_spread_of_weights(kind: str) -> None:
    raw = synthetic.random_blocks(np.random.default_rng(0), (64, 512), kind)
    values = dequantize(raw.reshape(64, -1), GGMLQuantizationType[kind])
    assert values.std() * 512**0.5 == pytest.approx(1, rel=0.02)
    assert abs(values.mean()) < 0.12 * values.std()


def test_the_mix_of_types_is_llama_cpp_s() -> None:
    def choose(
        name: str,
        width: int = 2048,
    ) -> str:
        return synthetic.choose_type(name, (8, width), "Q4_K_M", 8)

    assert choose("output.weight") == "Q6_K"
    assert choose("token_embd.weight") == choose("blk.1.attn_q.weight") == "Q4_K"
    assert [choose(f"blk.{layer}.ffn_down_exps.weight") for layer in range(8)].count("Q6_K") == 4
    assert choose("blk.1.ffn_down_exps.weight", 1408) == "Q5_0"
    assert choose("blk.0.ffn_down_exps.weight", 1408) == "Q8_0"
    assert synthetic.choose_type("output.weight", (8, 64), "Q8_0", 8) == "Q8_0"


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2_lite"])
def test_a_synthetic_file_is_a_model(
    family: str,
    tmp_path: Path,
) -> None:
    made = tiny.config(family, hidden_size=256, tie_word_embeddings=False)
    path = tmp_path / "model.gguf"
    synthetic.write(path, made, lambda _name, shape: "Q8_0" if shape[-1] % 32 == 0 else "F32")
    model, tokenizer = load_model(None, path, progress=False, accelerator="none")
    assert tokenizer is None and model.config.num_hidden_layers == made.num_hidden_layers
    with torch.no_grad():
        logits = model(tiny.tokens(6)).logits
    assert torch.isfinite(logits).all() and logits.std() > 0.05
    needed = roofline.token_bytes(path, model.config)
    assert 0 < needed < path.stat().st_size
    model.hybrimoe.close()


def test_slices_and_their_limits() -> None:
    assert synthetic.config("qwen2-57b-a14b", 2).num_experts == 64
    assert synthetic.config("deepseek-v2-lite", 27, 16).n_routed_experts == 16
    with pytest.raises(ConfigError, match="experts"):
        synthetic.config("mixtral-8x7b", 1, 1)
    with pytest.raises(ConfigError, match="layers"):
        synthetic.config("deepseek-v2-lite", 1)
    with pytest.raises(ConfigError, match="model"):
        synthetic.config("gpt-2", 1)


def test_a_token_reads_its_share_of_the_experts(tmp_path: Path) -> None:
    path = tiny.write(tmp_path, "mixtral", types="Q8_0")
    store = GGUFStore.open(path)
    experts = sum(info.nbytes for name, info in store.tensors.items() if "_exps" in name)
    rest = sum(info.nbytes for name, info in store.tensors.items() if "_exps" not in name)
    config = tiny.config("mixtral")
    embedding = store.info("token_embd.weight").nbytes
    assert roofline.token_bytes(path, config) == rest - embedding + experts * 2 // 8


def test_throughput_on_a_tiny_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tiny.write(tmp_path, "mixtral", types="Q8_0")
    arguments = [
        "--gguf_path",
        str(path),
        "--out",
        str(tmp_path),
        "--prompt_tokens",
        "5",
        "--steps",
        "2",
    ]
    peers = ["--peer_python", "/bin/false", "--ik_python", "/bin/false"]
    result = throughput.main([*arguments, "--turns", "1", "--twins", *peers])
    assert result["decode_vs_llama_cpp"] is result["decode_vs_fastest_peer"] is None
    assert result["decode_vs_plain_operators"] > 0
    out = capsys.readouterr()
    assert json.loads(out.out.strip().splitlines()[-1]) == result
    assert "make peers" in out.err and "roofline" in out.out
    text = (tmp_path / "throughput_model_5-tokens.csv").read_text()
    assert "plain operators" in text and "commit" in text.splitlines()[0]


class FakePeers(peer.Peers):
    """All programs answer at once; one of them finds other tokens than ours."""

    def add(self, program: peer.Program, python: str, gguf: Path, *sizes: int) -> None:
        self.notes[program.name] = f"{sizes}"

    def ask(self, prompt: Sequence[int], steps: Sequence[int]) -> dict[str, dict[str, Any]]:
        likeliest = {"llama.cpp": 5, "ik_llama.cpp": 6}
        return {
            name: {
                "prefill_s": 0.1,
                "step_s": [0.01] * len(steps),
                "likeliest": [likeliest[name]] * (1 + len(steps)),
            }
            for name in self.notes
        }


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Measures with fake peers, and with a model of ours that finds token 5 likeliest."""

    def run(prompt: Sequence[int], steps: Sequence[int]) -> throughput.Turn:
        return throughput.Turn(0.2, [0.02] * len(steps), [5] * (1 + len(steps)))

    monkeypatch.setattr(peer, "Peers", FakePeers)
    monkeypatch.setattr(roofline, "read_gbps", lambda threads: 1.0)
    monkeypatch.setattr(roofline, "token_bytes", lambda gguf, config: 1)
    monkeypatch.setattr(throughput, "_config", lambda *_: SimpleNamespace(vocab_size=9))
    monkeypatch.setattr(throughput, "_ours", lambda *_: (run, lambda: None))
    return lambda *options: throughput.measure(
        throughput._parser().parse_args(["--threads", "2", *options]), Path("none")
    )


@pytest.mark.parametrize(("prompt", "room"), [(128, 2048), (4000, 4024)])
def test_peers_have_room_for_the_prompt(prompt: int, room: int, asked: Callable[..., Any]) -> None:
    _, notes = asked("--prompt_tokens", str(prompt))
    assert notes["llama.cpp"] == f"(2, {room})"


def test_all_systems_take_as_many_turns_and_tell_who_computes_something_else(
    asked: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, notes = asked("--quick")
    assert [row["system"] for row in rows] == ["HybriMoE", "llama.cpp", "ik_llama.cpp"]
    assert [row["same_token"] for row in rows] == [1, 1, 0]
    assert "100%" in notes["ik_llama.cpp"] and "100%" not in notes["llama.cpp"]
    assert "ik_llama.cpp: finds another" in capsys.readouterr().err


def test_no_peer_takes_its_routing_from_a_trace(asked: Callable[..., Any]) -> None:
    _, notes = asked("--trace", "some.trace")
    assert all("from a trace" in note for note in notes.values()) and len(notes) == 2


def test_ratios_are_ours_over_theirs() -> None:
    turns = [
        throughput.Turn(0.5, [0.01, 0.02, 0.03]),
        throughput.Turn(0.7, [0.02]),
        throughput.Turn(0.5, [0.02]),
    ]
    rows = [
        throughput._row(name, some, prompt=100, bound_ms=10.0)
        for name, some in {
            "HybriMoE": turns,
            "llama.cpp": [throughput.Turn(1.0, [0.01])],
            "ik_llama.cpp": [throughput.Turn(0.25, [0.04])],
        }.items()
    ]
    assert rows[0]["tbt_ms_p50"] == pytest.approx(20)
    assert rows[0]["roofline_share"] == pytest.approx(0.5)
    result = throughput.summary("demo", rows, 2, {})
    assert result["decode_vs_llama_cpp"] == pytest.approx(0.5)
    assert result["prefill_vs_llama_cpp"] == pytest.approx(2.0)
    assert result["decode_vs_ik_llama_cpp"] == pytest.approx(2.0)
    assert result["prefill_vs_ik_llama_cpp"] == pytest.approx(0.5)


def test_the_fastest_peer_is_another_one_for_decode_than_for_prefill() -> None:
    ours = throughput._row("HybriMoE", [throughput.Turn(1.0, [0.01])], 100, 10.0)
    theirs = throughput._row("llama.cpp", [throughput.Turn(2.0, [0.005])], 100, 10.0)
    other = throughput._row("ik_llama.cpp", [throughput.Turn(0.5, [0.02])], 100, 10.0)
    result = throughput.summary("demo", [ours, theirs, other], 2, {})
    assert result["decode_vs_fastest_peer"] == pytest.approx(0.5)
    assert result["prefill_vs_fastest_peer"] == pytest.approx(0.5)
    alone = throughput.summary("demo", [ours, other], 2, {})
    assert alone["decode_vs_fastest_peer"] == pytest.approx(2.0)
    assert alone["decode_vs_llama_cpp"] is None


def test_routing_from_a_trace(tmp_path: Path) -> None:
    model, _ = load_model(
        None, tiny.write(tmp_path, "mixtral"), progress=False, cpu_backend="torch", dtype="float32"
    )
    calls = [
        Call(
            layer,
            np.array([[1, 6], [2, 5], [0, 7]]) + 0 * layer,
            np.full((3, 2), 0.5, np.float32),
            None,
            (),
        )
        for layer in (0, 1)
    ]
    path = tmp_path / "routing.trace"
    write_trace(path, TraceHeader("tiny", 2, 8, 2, 1, "a test"), calls)
    forced.route_by(model, path)
    seen: list[list[list[int]]] = []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda _m, args: seen.append(args[1].tolist())
    )
    with torch.no_grad():
        model(tiny.tokens(2))
        model(tiny.tokens(2))
    assert seen == [[[1, 6], [2, 5]], [[0, 7], [1, 6]]]
    write_trace(path, TraceHeader("tiny", 1, 8, 2, 1, "a test"), calls[:1])
    with pytest.raises(ConfigError, match="routes"):
        forced.route_by(model, path)
    model.hybrimoe.close()


def test_fidelity_counts_what_it_says() -> None:
    chunk = torch.tensor([[0, 1, 2, 3]])
    plain = torch.eye(4)[[1, 2, 3, 0]] * 4
    same = fidelity.compare([chunk], [plain], [plain])
    assert (
        same["token_agreement"] == 1
        and same["perplexity_difference"] == same["logits_relative_rms"] == 0
    )
    other = plain.clone()
    other[1] = other[1].flip(0)
    changed = fidelity.compare([chunk], [plain], [other])
    assert (
        changed["token_agreement"] == pytest.approx(2 / 3) and changed["perplexity_difference"] > 0
    )


def test_int8_activations_are_compared_with_floating_point_ones(tmp_path: Path) -> None:
    """Experts alone differ: the rest is the plain model's arithmetic."""
    path = tiny.write(tmp_path, "mixtral", types="Q8_0")
    chunk = tiny.tokens(20)
    plain, _ = fidelity._load(None, path, None)
    wanted = [fidelity.logits(plain, chunk, decoded=0)]
    in_float, in_int8 = fidelity.on_gpu(None, path, [chunk])
    same = fidelity.compare([chunk], wanted, in_float)
    assert same["token_agreement"] == 1
    assert same["logits_relative_rms"] < 1e-5
    rounded = fidelity.compare([chunk], in_float, in_int8)
    assert 1e-4 < rounded["logits_relative_rms"] < 0.05


def test_the_report_survives_a_question_that_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(
        question: str,
        out: Path,
        _quick: bool,
    ) -> every.Answer:
        out.mkdir(parents=True)
        table = out / "t.csv"
        table.write_text("system,ms,cpu\nours <1>,1.23456,x\n")
        figure = out / "t.png"
        figure.write_bytes(b"png")
        if question == "cache":
            return every.Answer(question, 1.0, None, "Traceback <boom>", ())
        return every.Answer(question, 2.0, {"gap_mean": 0.01}, "", (table, figure))

    monkeypatch.setattr(every, "ask", answer)
    assert every.main(["--quick", "--out", str(tmp_path), "--only", "schedule", "cache"]) == 1
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    page = (tmp_path / "report.html").read_text()
    assert result["failed"] == ["cache"] and "failed after" in page and "&lt;boom&gt;" in page
    assert "data:image/png;base64," in page and "ours &lt;1&gt;" in page and "1.235" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_a_question_in_a_process_of_its_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = every.ask("schedule", tmp_path, True)
    assert good.result is not None and good.result["gap_max"] < 0.06
    assert {path.suffix for path in good.files} >= {".csv"}
    bad = every.ask("no_such_question", tmp_path, True)
    assert bad.result is None and "No module" in bad.output
    values: dict[str, Any] = {"a": 1}
    assert every._last_json(f"table\n{json.dumps(values)}\n") == values
    assert every._last_json("no json") is every._last_json("") is None
