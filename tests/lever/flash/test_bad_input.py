"""Packs that do not fit, change or vanish under a running target, and a packer that is killed: seen
from outside.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hybrimoe_plugin.errors import BackendError, FlashError, HybriMoEError, WeightsError
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model_of
from lever_ext.flash import writer
from lever_ext.flash.format import ALIGNMENT
from lever_ext.flash.pack import FlashPack
from lever_ext.flash.source import StateDictSource
from lever_ext.flash.writer import write_pack
from lever_ext.packing import pack_model
from lever_ext.target import load_target
from tests.lever.helpers import tiny_config

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}
PROMPT = torch.arange(3, 12)[None]


@pytest.mark.parametrize(
    ("weights", "config", "changed"),
    [
        ("llama", "llama", {"intermediate_size": 96}),
        ("llama", "llama", {"num_hidden_layers": 5}),
        ("llama", "llama", {"num_key_value_heads": 4}),
        ("llama", "llama", {"vocab_size": 80}),
        ("llama", "mixtral", {}),
        ("mixtral", "llama", {}),
        ("mixtral", "mixtral", {"num_local_experts": 4}),
    ],
)
def test_a_pack_of_another_model_is_refused(
    weights: str, config: str, changed: dict[str, Any], plain_models: dict[str, Any], tmp_path: Path
) -> None:
    """Sound in itself, but its weights are not those of the config beside them."""
    source = StateDictSource(dict(plain_models[weights].state_dict()), "tiny")
    said = {**tiny_config(config), **changed}
    write_pack(
        source, meta_model_of(tiny_config(weights), torch.float32), said, tmp_path, "float32"
    )
    with pytest.raises(
        HybriMoEError, match="another (model|one)|needs|no .* in this model|matches no"
    ) as caught:
        load_target(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_their_config_are_not_packed(
    plain_models: dict[str, Any], tmp_path: Path
) -> None:
    source = StateDictSource(dict(plain_models["mixtral"].state_dict()), "tiny")
    fewer = {**tiny_config("mixtral"), "num_local_experts": 4}
    with pytest.raises(
        WeightsError, match=r"gate\.weight' has shape \(8, 32\), the config asks for \(4, 32\)"
    ):
        write_pack(source, meta_model_of(fewer, torch.float32), fewer, tmp_path, "float32")
    with pytest.raises(FlashError, match="cannot open"):
        load_target(tmp_path)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("how", ["truncated", "overwritten", "replaced", "removed"])
def test_a_pack_that_changes_under_a_running_target(
    family: str, how: str, plain_models: dict[str, Any], packs: dict[str, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copy(packs[family], tmp_path / "target.lever"))
    pack = FlashPack.open(path)
    layers, experts = pack.blocks("layer"), pack.blocks("expert")
    budget = sum(b.nbytes for b in pack.blocks("resident")) + 2 * layers[0].nbytes
    pack.close()
    target = load_target(path, dram_budget=budget + 4 * (experts[0].nbytes if experts else 0))
    want = plain_models[family].generate(PROMPT, **GREEDY)
    assert torch.equal(target.model.generate(PROMPT, **GREEDY), want)
    if how == "truncated":
        os.truncate(path, ALIGNMENT * 3)
    elif how == "overwritten":
        with path.open("r+b") as file:
            file.seek(layers[-1].offset)
            file.write(b"\0" * ALIGNMENT)
    elif how == "replaced":
        os.replace(shutil.copy(packs["llama"], tmp_path / "other"), path)
    else:
        path.unlink()
    if how in ("truncated", "overwritten"):
        with pytest.raises(FlashError, match="changed|truncated"):
            target.model.generate(PROMPT, **GREEDY)
    else:  # the open file is still the old one
        assert torch.equal(target.model.generate(PROMPT, **GREEDY), want)
    target.close()


KILLED = """
import os, signal, sys
import torch
from torch import nn
from lever_ext.flash import writer
from lever_ext.flash.source import StateDictSource

writer.SYNC_BYTES = 1
torch.manual_seed(0)
model = nn.Module()
model.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
model.norm = nn.LayerNorm(64)
done = []

def progress(count, total):
    done.append(count)
    if len(done) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

writer.write_pack(StateDictSource(dict(model.state_dict()), "killed"), model, {}, sys.argv[1], "float32", progress)
print(len(done))
"""  # noqa: E501


def test_a_packer_killed_for_good_leaves_the_former_pack_and_is_resumed(tmp_path: Path) -> None:
    def run(stop: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", KILLED, str(tmp_path), str(stop)]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)

    killed = run(4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(FlashError):
        FlashPack.open(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert "target.lever" not in left
    resumed = run(99)
    assert resumed.returncode == 0 and 0 < int(resumed.stdout) < 7
    pack = FlashPack.open(tmp_path)
    for block in pack.index.blocks:
        pack.load(block)
    pack.close()


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_packing_is_resumed_from_the_same_model_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may have files of the same name, size and time."""
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)

    def write(seed: int) -> dict[str, Path]:
        folder = tmp_path / str(seed) / "model"
        folder.mkdir(parents=True)
        if kind == "gguf":
            tiny.write(folder, "llama", seed)
        else:
            tiny.model("llama", seed).save_pretrained(folder)
        for file in folder.iterdir():
            os.utime(file, (0, 0))
        return {"gguf_path": folder} if kind == "gguf" else {"model_path": folder}

    def pack(source: dict[str, Path], to: str, stop: int = 0) -> tuple[bytes, int]:
        written = list[int]()

        def progress(count: int, total: int) -> None:
            written.append(count)
            if len(written) == stop:
                raise KeyboardInterrupt

        return pack_model(
            tmp_path / to, dtype="float32", progress=progress, **source
        ).read_bytes(), len(written)

    sources = [write(seed) for seed in range(2)]
    wanted = [pack(source, f"whole {seed}") for seed, source in enumerate(sources)]
    for seed, source in enumerate(sources):
        with pytest.raises(KeyboardInterrupt):
            pack(sources[0], f"resumed {seed}", stop=3)
        content, written = pack(source, f"resumed {seed}")
        assert content == wanted[seed][0]
        assert written == wanted[seed][1] - (3 if seed == 0 else 0)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_would_go_wrong_with_weights_on_flash_is_refused(
    family: str, plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    """Buffers are read into again while a backward pass would need them; a copy or checkpoint would
    lack layers.
    """
    target = load_target(packs[family])
    plain, model = plain_models[family], target.model
    loss = model(
        inputs_embeds=plain.get_input_embeddings()(PROMPT).detach().requires_grad_(), labels=PROMPT
    ).loss
    torch.testing.assert_close(loss.detach(), plain(PROMPT, labels=PROMPT).loss.detach())
    with pytest.raises(BackendError, match=r"model\.layers\.3 is computed without gradients"):
        loss.backward()
    for call in (
        lambda: model.save_pretrained("nowhere"),
        model.state_dict,
        lambda: copy.deepcopy(model),
        model.half,
    ):
        with pytest.raises(BackendError, match="the model that the pack was made from|load"):
            call()
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, plain(PROMPT).logits)
    target.close()
