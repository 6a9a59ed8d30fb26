"""The demo model talks sense, says what its plain twin says, and survives a damaged cache."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import needs
import pytest
import torch

from hybrimoe_plugin import load_model
from hybrimoe_plugin.cache_folder import cache_dir
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.config import DEMO_FORMS
from hybrimoe_plugin.demo import FORMS, build_demo_model, source_path
from hybrimoe_plugin.demo import build as builder
from hybrimoe_plugin.engine import cpu_choice
from hybrimoe_plugin.errors import ConfigError, HybriMoEError
from hybrimoe_plugin.hosts.transformers import load_plain_model

PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write a sentence about the sea.",
    "What is 2 plus 3?",
    "Say hello in Spanish.",
)
NEW = 10

try:
    source_path()
except HybriMoEError as missing:
    pytest.skip(str(missing), allow_module_level=True)


def test_the_command_line_offers_every_form() -> None:
    assert tuple(FORMS) == DEMO_FORMS


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    return load_plain_model(None, build_demo_model(progress=False), dtype="float32", progress=False)


def encode(tokenizer: Any, prompt: str) -> Any:
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def ask(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    inputs = encode(tokenizer, prompt)
    answer = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return list(answer[0, inputs["input_ids"].shape[1] :].tolist())


def test_greedy_answers_equal_the_plain_model(
    plain: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token with the torch backend; kt-kernel's 8-bit activations may flip a near tie now
    and then.
    """
    wanted = [ask(*plain, prompt) for prompt in PROMPTS]
    path = build_demo_model(progress=False)
    with monkeypatch.context() as patch:
        # Remembering the dequantised experts takes 2.5 GB and a tenth of the time.
        patch.setattr(cpu_choice, "make_cpu", lambda *_: TorchExperts(keep=True))
        exact, tokenizer = load_model(
            None, path, dtype="float32", cpu_backend="torch", cpu_threads=1, progress=False
        )
    assert [ask(exact, tokenizer, prompt) for prompt in PROMPTS] == wanted
    assert "Paris" in tokenizer.decode(wanted[0])
    exact.hybrimoe.close()
    needs.kt_kernel()
    # Dense matrices as stored would add their own 8-bit activations; `eval.fidelity` measures both
    # together.
    native, _ = load_model(
        None, path, dtype="float32", cpu_backend="kt", dense="plain", progress=False
    )
    # Judged token by token after the plain model's own words: one near tie must not count against
    # all that follows.
    same = total = 0
    for prompt, answer in zip(PROMPTS, wanted, strict=True):
        ids = torch.cat([encode(tokenizer, prompt)["input_ids"], torch.tensor([answer])], dim=1)
        with torch.no_grad():
            chosen = native(ids).logits[0, -len(answer) - 1 : -1].argmax(dim=-1).tolist()
        same += sum(a == b for a, b in zip(chosen, answer, strict=True))
        total += len(answer)
    print(f"kt-kernel agrees on {same} of {total} greedy tokens")
    assert same >= 0.9 * total
    native.hybrimoe.close()


def test_routing_depends_on_the_input(plain: tuple[Any, Any]) -> None:
    model, tokenizer = plain
    ids = tokenizer(
        "The cat sat on the mat, and then def f(x): return x + 1 was typed.", return_tensors="pt"
    ).input_ids
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out: chosen.append(out[2]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    used = [len(layer.unique()) for layer in chosen]
    assert sum(used) / len(used) > 4


def test_it_is_a_complete_gguf_of_each_form() -> None:
    from hybrimoe_plugin.weights.gguf_store import GGUFStore

    store = GGUFStore.open(build_demo_model(progress=False))
    assert store.architecture == "llama"
    assert store.metadata["llama.expert_count"] == 8
    assert "tokenizer.chat_template" in store.metadata
    with pytest.raises(ConfigError, match="form"):
        build_demo_model("dense")


def test_a_damaged_cache_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = []

    def write(form: str, path: Path, *_: Any) -> None:
        written.append(form)
        path.write_bytes(b"a model")

    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(builder, "write_model", write)
    path = build_demo_model("qwen2moe", progress=False)
    assert path.is_relative_to(cache_dir())
    assert build_demo_model("qwen2moe", progress=False) == path
    assert written == ["qwen2moe"]
    path.write_bytes(b"a m0del")
    build_demo_model("qwen2moe", progress=False)
    assert "damaged" in caplog.text
    assert path.read_bytes() == b"a model"


def test_a_file_that_stays_as_it_is_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_form: str, path: Path, *_: Any) -> None:
        path.write_bytes(b"a model")

    read = []

    def checksum(path: Path) -> str:
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(builder, "write_model", write)
    monkeypatch.setattr(builder, "_sha256", checksum)
    path = build_demo_model(progress=False)
    os.utime(path, (1e9, 1e9))  # not in the moment of the check
    read.clear()
    for _ in range(3):
        build_demo_model(progress=False)
    assert read == [path]
    path.write_bytes(b"a m0del")
    build_demo_model(progress=False)
    assert path.read_bytes() == b"a model"


def test_a_file_is_read_again_while_a_change_could_have_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(builder, "write_model", lambda _f, path, *_: path.write_bytes(b"a model"))
    path = build_demo_model(progress=False)
    soon = time.time() + 60
    os.utime(path, (soon, soon))
    build_demo_model(progress=False)
    path.write_bytes(b"a m0del")
    os.utime(path, (soon, soon))
    build_demo_model(progress=False)
    assert path.read_bytes() == b"a model"


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(form: str, path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(builder, "write_model", write)
    with pytest.raises(KeyboardInterrupt):
        build_demo_model(progress=False)
    assert list((tmp_path / "demo").iterdir()) == []
