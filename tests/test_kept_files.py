"""`hybrimoe cache` lists and removes what the program wrote, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hybrimoe_plugin import kept_files
from hybrimoe_plugin.cli import cache as command
from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.config import DEMO_FORMS
from hybrimoe_plugin.core import ExpertSpec

PROFILE = f"profiles/{'0a' * 10}.json"
OWN = (
    "demo/SmolLM2-135M-mixtral-v2-Q8_0.gguf",
    "demo/SmolLM2-135M-mixtral-v2-Q8_0.sha256",
    "demo/SmolLM2-135M-mixtral-v2-Q8_0.checked",
    "demo/classic-SmolLM2-135M-mixtral-v2-Q8_0-tokenizers-0.19/config.json",
    "demo/tmpab12_xyz.part",
    "synthetic/qwen3-30b-a3b-4-layers-Q4_K_M-v1.gguf",
    "lever/dense/target.lever",
    "lever/dense/tokenizer.json",
    "lever/dense/chat_template.jinja",
    PROFILE,
    f"{PROFILE}abc123_z",
    f"kernels/{'1b' * 10}.json",
    f"hybrimoe-triton/{'AB' * 26}/kernel.cubin",
    "chat_history",
)
FOREIGN = (
    "demo/mine.gguf",
    "lever/dense/notes.txt",
    "profiles/h100.json",
    "synthetic/readme",
    "models/target.lever",
    "triton/code.so",
    "historic.txt",
    # Of a cache folder that is the user's home too.
    "demo/SmolLM2-360M-my-finetune.gguf",
    "demo/SmolLM2-135M-mixtral-v2-Q8_0.sha256.txt",
    "demo/classic-cars/config.json",
    "demo/tmpfiles.part",
    "synthetic/llama-v3.gguf",
    "lever/mine/target.lever",
    "lever/mine/tokenizer.json",
    f"{PROFILE}.notes",
    "hybrimoe-triton/anything.txt",
    "chat_history_of_my_thesis",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("HYBRIMOE_CACHE", str(root))
    monkeypatch.setattr(kept_files, "folders", lambda: [root])
    for name in (*OWN, *FOREIGN):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 1000)
    return root


def names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}


def test_what_is_ours_is_listed_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    for kind in kept_files.KINDS:
        assert f"{kind.name}: {kind.purpose}" in out
    assert "14 files, 13.7 KiB in all" in out
    assert "mine" not in out and "h100" not in out


def test_clearing_removes_ours_and_leaves_the_rest(cache: Path) -> None:
    assert main(["cache", "clear", "--yes"]) == 0
    assert names(cache) == set(FOREIGN)
    assert not (cache / "kernels").exists()
    assert main(["cache", "clear", "--yes"]) == 0


def test_only_the_named_kinds_are_cleared(cache: Path) -> None:
    assert main(["cache", "clear", "profiles", "history", "--yes"]) == 0
    gone = {PROFILE, f"{PROFILE}abc123_z", "chat_history"}
    assert names(cache) == {*OWN, *FOREIGN} - gone


def test_links_are_neither_followed_nor_lost(cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "target.lever").write_text("a pack of the user's")
    (cache / "lever" / "mixtral").symlink_to(outside)
    demo = "SmolLM2-135M-mixtral-v2-Q8_0"
    linked = cache / f"demo/classic-{demo}-tokenizers-0.19/{demo}.gguf"
    linked.symlink_to(outside / "target.lever")
    assert main(["cache", "clear", "--yes"]) == 0
    assert (outside / "target.lever").exists()
    assert (cache / "lever" / "mixtral").is_symlink()
    assert not linked.is_symlink()  # made by the program itself


def test_an_interrupted_removal_leaves_nothing_half_usable(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops, what remains is taken for missing, and the next removal ends it."""
    unlink = Path.unlink
    left = [2]

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupted)
    assert main(["cache", "clear", "demo", "packs", "--yes"]) == 130
    assert not (cache / "demo/SmolLM2-135M-mixtral-v2-Q8_0.gguf").exists()
    assert not (cache / "lever/dense/target.lever").exists()
    assert (cache / "demo/SmolLM2-135M-mixtral-v2-Q8_0.sha256").exists()
    monkeypatch.undo()
    monkeypatch.setattr(kept_files, "folders", lambda: [cache])
    assert main(["cache", "clear", "--yes"]) == 0
    assert names(cache) == set(FOREIGN)


def test_it_asks_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(cache)
    assert main(["cache", "clear"]) == 2
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr(command, "_need_terminal", lambda: None)
    for answer in ("", "n", "yess"):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert main(["cache", "clear"]) == 0
        assert names(cache) == before
    monkeypatch.setattr("builtins.input", lambda _: "Y")
    assert main(["cache", "clear"]) == 0
    assert names(cache) == set(FOREIGN)


def test_an_unknown_kind_suggests_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", "profile", "--yes"]) == 2
    assert "did you mean profiles?" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove anything")
def test_what_cannot_be_removed_is_an_error(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "profiles").chmod(0o500)
    assert main(["cache", "clear", "profiles", "--yes"]) == 2
    assert "could not be removed" in capsys.readouterr().err
    (cache / "profiles").chmod(0o700)


def test_what_the_program_writes_now_is_known(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names as their writers make them."""
    from eval.models import synthetic
    from hybrimoe_plugin.cache_folder import write_atomic
    from hybrimoe_plugin.demo import build
    from hybrimoe_plugin.engine.profile_store import profile_path

    def write(form: str, path: Path, *_: object) -> None:
        path.write_text(form)

    monkeypatch.delenv("HYBRIMOE_PROFILES", raising=False)
    monkeypatch.setattr(build, "write_model", write)
    monkeypatch.setattr(synthetic, "write", lambda path, *_: path.write_text("x"))
    monkeypatch.setattr(synthetic, "config", lambda *_: None)
    spec = ExpertSpec(32, 32, 4, 2, "Q8_0", "Q8_0", "Q8_0", 1, 1, 1)
    profile = profile_path(spec, "ggml", "none", None)
    write_atomic(profile, "{}")
    written = [
        build.build_demo_model("qwen2moe"),
        synthetic.build("qwen3-30b-a3b", 48, experts=16),
        profile,
    ]
    found = {file.root / file.path for file in kept_files.kept_files()}
    assert found >= {*written, written[0].with_suffix(".sha256")}


def test_a_pack_for_measurements_is_known(cache: Path) -> None:
    for name in ("dense", "narrow-fp32", *DEMO_FORMS):
        (cache / "lever" / name).mkdir(exist_ok=True)
        (cache / "lever" / name / "target.lever").touch()
    found = {file.group for file in kept_files.kept_files(["packs"])}
    assert found == {"dense", "narrow-fp32", *DEMO_FORMS}


def test_synthetic_models_of_every_kind_are_known(cache: Path) -> None:
    from eval.models import synthetic

    names = {
        f"{model}-2-layers{part}-{quantisation}-v{synthetic.VERSION}.gguf"
        for model in synthetic.SHAPES
        for part in ("", "-4-experts")
        for quantisation in synthetic.QUANTISATIONS
    }
    for name in names:
        (cache / "synthetic" / name).touch()
    assert {file.path.name for file in kept_files.kept_files(["synthetic"])} >= names


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_cache_folder_that_is_none_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path / name))
    assert main(["cache"]) == 0
    err = capsys.readouterr().err
    assert f"the cache folder {tmp_path / name} cannot be used: {tmp_path}/file is no folder" in err


def test_a_cache_folder_that_is_not_there_yet_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path / "new" / "folder"))
    monkeypatch.setattr(kept_files, "folders", lambda: [tmp_path / "new" / "folder"])
    assert main(["cache"]) == 0
    assert capsys.readouterr() == ("nothing is kept\n", "")
    assert not (tmp_path / "new").exists()


def test_a_folder_whose_name_has_escapes_is_shown_plainly(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = cache.rename(cache.with_name("cache\x1b[2J"))
    monkeypatch.setenv("HYBRIMOE_CACHE", str(other))
    monkeypatch.setattr(kept_files, "folders", lambda: [other])
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert r"cache\x1b[2J" in out and "\x1b" not in out
