"""eval.peers: what is asked of other programs, and what happens where one fails."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest

from eval.peers import peer
from eval.peers.interpreters import can_import

VOCABULARY = 8

FAKE_LLAMA = """
    import ctypes
    __version__ = "1.2.3"
    class Llama:
        ctx = None
        def __init__(self, gguf, **settings):
            assert settings["n_threads"] == settings["n_threads_batch"] == 2
            assert settings["n_batch"] == settings["n_ubatch"] == 512
        def reset(self):
            pass
        def eval(self, tokens):
            global last
            last = tokens[-1]
        def n_vocab(self):
            return 8
    def llama_get_logits_ith(ctx, place):
        assert place == -1
        return (ctypes.c_float * 8)(*[float(token == last) for token in range(8)])
"""
"""Finds the last token likeliest again."""

FAKE_IK = """
    import ctypes, os
    from types import SimpleNamespace
    state = SimpleNamespace(position=0)
    class _lib:
        def llama_print_system_info():
            return b"AVX2 = 1 | AVX512 = 0"
    def llama_backend_init():
        pass
    def llama_model_default_params():
        return SimpleNamespace()
    def llama_context_default_params():
        return SimpleNamespace()
    def llama_model_load_from_file(path, settings):
        if b"refused" in path and settings.repack_tensors:
            return None
        return 1
    def llama_init_from_model(model, settings):
        assert settings.n_threads == settings.n_threads_batch == 2
        assert settings.n_batch == settings.n_ubatch == 512
        return 2
    def llama_model_get_vocab(model):
        return 3
    def llama_vocab_n_tokens(vocabulary):
        return 8
    def llama_kv_cache_clear(context):
        state.position = 0
    def llama_decode(context, batch):
        tokens, start, logits = batch
        assert len(tokens) <= 512 and start == state.position
        state.position += len(tokens)
        state.last, state.logits = tokens[-1], logits
        if state.position == 3000:
            os._exit(7)
        return 0
    def llama_batch_free(batch):
        pass
    def llama_get_logits_ith(context, place):
        assert state.logits and place == -1
        return (ctypes.c_float * 8)(*[float(token == state.last) for token in range(8)])
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of both programs for this interpreter; gives a folder of its own."""
    (tmp_path / "llama_cpp.py").write_text(dedent(FAKE_LLAMA))
    ik = tmp_path / "ik_llama_cpp"
    ik.mkdir()
    (ik / "__init__.py").write_text('__version__ = "0.1"\n')
    (ik / "_ctypes_api.py").write_text(dedent(FAKE_IK))
    (ik / "_internals.py").write_text(
        "def make_batch_range(tokens, *, pos_start, logits_last):\n"
        "    return tokens, pos_start, logits_last\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("program", [peer.LLAMA_CPP, peer.IK_LLAMA_CPP], ids=lambda one: one.name)
def test_both_programs_answer_the_same_requests(program: peer.Program, fakes: Path) -> None:
    peers = peer.Peers()
    peers.add(program, sys.executable, fakes / "model.gguf", 2, 2048)
    answer = peers.ask([3] * 1029 + [5], [1, 7])[program.name]
    assert answer["likeliest"] == [5, 1, 7]
    assert answer["prefill_s"] > 0 and len(answer["step_s"]) == 2
    peers.close()
    assert program.ways[0].note in peers.notes[program.name]
    assert peers.ask([3], []) == {}


def test_the_note_says_what_kernels_were_compiled_for(fakes: Path) -> None:
    started, note = peer.start(peer.IK_LLAMA_CPP, sys.executable, fakes / "model.gguf", 2, 64)
    started.close()
    assert "ik-llama-cpp-python 0.1 (compiled for AVX2)" in note


def test_a_program_runs_in_the_first_way_that_it_survives(fakes: Path) -> None:
    path = fakes / "refused.gguf"
    started, note = peer.start(peer.IK_LLAMA_CPP, sys.executable, path, 2, 64)
    started.close()
    assert note.endswith("without flash attention, because it ended with status 1 otherwise")


def test_a_program_that_dies_is_asked_no_more(
    fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = peer.Peers()
    for program in (peer.LLAMA_CPP, peer.IK_LLAMA_CPP):
        peers.add(program, sys.executable, fakes / "model.gguf", 2, 4096)
    assert set(peers.ask([3], [])) == {"llama.cpp", "ik_llama.cpp"}
    assert set(peers.ask([3] * 3000, [])) == {"llama.cpp"}
    assert set(peers.ask([3], [])) == {"llama.cpp"}
    peers.close()
    assert "ended with status 7" in peers.notes["ik_llama.cpp"]
    assert "ended with status 7" in capsys.readouterr().err


def test_what_is_missing_is_said_with_the_way_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = peer.Peers()
    for program in (peer.LLAMA_CPP, peer.IK_LLAMA_CPP):
        peers.add(program, "/bin/false", tmp_path / "none.gguf", 1, 16)
    assert peers.ask([3], []) == {}
    assert all("make peers" in note for note in peers.notes.values())
    assert capsys.readouterr().err.count("make peers") == 2


def test_a_file_that_no_way_can_load_is_an_error(tmp_path: Path) -> None:
    assert not can_import("/bin/false", peer.LLAMA_CPP.package)
    for python in ("/bin/false", sys.executable):
        with pytest.raises(RuntimeError, match=r"llama\.cpp ended with status"):
            peer.start(peer.LLAMA_CPP, python, tmp_path / "none.gguf", 1, 16)


@pytest.mark.parametrize("program", [peer.LLAMA_CPP, peer.IK_LLAMA_CPP], ids=lambda one: one.name)
def test_every_way_has_a_note_of_its_own(program: peer.Program) -> None:
    notes = [way.note for way in program.ways]
    assert len(set(notes)) == len(notes)
