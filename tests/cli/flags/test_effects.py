"""Every flag of `local_chat`, in every kind of chat: it changes something, or is refused by name.

The hosts are stand-ins that record what they are given. A flag has an effect if the record differs
from the one without it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hybrimoe_plugin.cli import local_chat, models
from hybrimoe_plugin.cli.chat import conversation
from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.device import machine
from tests.cli.flags.flag_table import CHATS, FLAGS

SELECT_FLASH = ("flash_pack", "draft", "dram_budget", "tree", "early_exit")


class Recorder:
    """The hosts and the conversation, and what they were given."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def note(self, name: str, result: Any = None) -> Any:
        """A function that records its arguments."""

        def call(*args: Any, **named: Any) -> Any:
            self.seen[name] = ([value for value in args if _plain(value)], named)
            return result

        return call

    def chat(
        self, _model: Any, _tokenizer: Any, options: Any, *_: Any, kept: Any, **__: Any
    ) -> Any:
        self.seen["options"] = options
        self.seen["kept"] = kept.store.limit
        self.seen["chat"] = found = _Chat()
        return found

    def converse(self, args: argparse.Namespace, _chat: Any, *rest: Any) -> int:
        prompt = [value for value in rest if isinstance(value, str)]
        self.seen["conversation"] = (args.prompt_file, prompt)
        return 0

    def records(self, *paths: Any) -> Any:
        self.seen["records"] = paths
        return _Records()


class _Chat:
    """A chat whose settings and questions are its text."""

    def answer(self, prompt: str) -> bool:
        self.prompt = prompt
        return True

    def __repr__(self) -> str:
        return repr(vars(self))


class _Records:
    def __enter__(self) -> _Records:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def attach(self, _model: Any) -> None:
        pass


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | Path | None)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    for package in ("hybrimoe_plugin", "lever_ext"):
        logger = logging.getLogger(package)
        monkeypatch.setattr(logger, "level", logger.level)  # which flags change
    found = Recorder()
    model = SimpleNamespace(hybrimoe=SimpleNamespace(engines=()))
    host = ModuleType("hybrimoe_plugin.hosts.transformers")
    vars(host)["load_model"] = found.note("load", (model, "tokenizer"))
    monkeypatch.setitem(sys.modules, host.__name__, host)
    monkeypatch.setattr(models, "demo_gguf", found.note("demo", "demo.gguf"))
    monkeypatch.setattr(conversation, "Chat", found.chat)
    monkeypatch.setattr(local_chat, "Records", found.records)
    monkeypatch.setattr(local_chat, "_converse", found.converse)
    # As on a machine with a GPU.
    monkeypatch.setattr(machine, "cuda_device", found.note("checked"))
    monkeypatch.setattr(machine, "cuda_refusal", lambda: None)
    _flash(found, model, monkeypatch)
    return found


def _flash(found: Recorder, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = SimpleNamespace(
        model=model,
        split=None,
        accelerator=None,
        pack=SimpleNamespace(path=None),
        stop_as=lambda _tokenizer: None,
        load_gate=found.note("gate"),
        close=lambda: None,
    )
    decoding = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr("lever_ext.target.load_target", found.note("target", target))
    monkeypatch.setattr("lever_ext.drafts.make.make_draft", found.note("draft"))
    monkeypatch.setattr("lever_ext.speculation.verify.takes_trees", lambda _model: True)
    monkeypatch.setattr("lever_ext.decoding.LeverDecoding", _Decoding(found, decoding))
    monkeypatch.setattr("lever_ext.flash.reader.plain_gbps", lambda _path: 1.0)
    monkeypatch.setattr("lever_ext.packing.pack_tokenizer", lambda _pack: "tokenizer")


class _Decoding:
    def __init__(self, found: Recorder, result: Any) -> None:
        self.found = found
        self.result = result

    def __call__(self, _draft: Any, policy: Any, _target: Any, **named: Any) -> Any:
        self.found.seen["policy"] = (policy.name, sorted(vars(policy).items(), key=str))
        self.found.seen["decoding"] = named
        return self.result


def outcome(recorder: Recorder, argv: list[str]) -> tuple[int, dict[str, str]]:
    """Exit code, and the record of what the hosts were given."""
    recorder.seen = {}
    torch.manual_seed(0)
    code = main(["local_chat", *argv])
    recorder.seen["seed"] = torch.initial_seed()
    # Compared as text: policies of two runs are different objects.
    return code, {name: _text(value) for name, value in recorder.seen.items()}


def _text(value: Any) -> str:
    return repr(value).partition(" object at ")[0] if "policy" in str(value) else repr(value)


def all_flags() -> set[str]:
    """Every flag but the negative forms of switches, by where its value is stored or its name."""
    parser = argparse.ArgumentParser(add_help=False)
    local_chat.add_arguments(parser)
    names = {
        action.option_strings[0].lstrip("-")
        for action in parser._actions
        if not isinstance(action, argparse._StoreFalseAction)
    }
    return names


def test_the_table_has_every_flag() -> None:
    assert set(FLAGS) | {"mode"} == all_flags()


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_has_an_effect_or_is_refused(
    name: str, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = FLAGS[name]
    for chat, base in CHATS.items():
        if chat != "flash" and name in SELECT_FLASH:
            continue  # it makes another chat of this one: see below
        typed = [f"--{name}", flag.value]
        if chat[0] in flag.chats:
            usual = [*base, *flag.beside.split()]
            code, before = outcome(recorder, usual)
            assert code == 0, capsys.readouterr().err
            code, after = outcome(recorder, [*usual, *typed])
            assert code == 0, capsys.readouterr().err
            assert after != before, chat
        else:
            code, after = outcome(recorder, [*base, *typed])
            err = capsys.readouterr().err
            assert code == 2 and set(after) == {"seed"}, (chat, err)
            shown = {"gguf_path": "model_path", "optimize_config_path": "rules"}.get(name, name)
            assert f"--{name}" in err or f"--{shown}" in err, err
            assert "no effect" in err or "give one of them" in err, err


@pytest.mark.parametrize("name", [name for name in SELECT_FLASH if name != "flash_pack"])
def test_flags_for_flash_beside_a_model_ask_for_its_pack(
    name: str, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    code, after = outcome(recorder, ["--gguf_path", "g", f"--{name}", FLAGS[name].value])
    err = capsys.readouterr().err
    assert code == 2 and set(after) == {"seed"}
    assert f"--{name} selects a target on flash, which needs a pack" in err


@pytest.mark.parametrize(
    ("flags", "named", "reason"),
    [
        ("--demo --prompt hi --prompt_file f", "--prompt_file", "--prompt"),
        ("--demo --trust_rules", "--trust_rules", "--rules FILE"),
        ("--demo --greedy --top_p 0.5 --top_k 3", "--top_p, --top_k", "--greedy takes"),
        ("--demo --greedy --temperature 0.7", "--temperature", "--greedy takes"),
        ("--demo --temperature 0 --min_p 0.5", "--min_p", "--temperature 0 takes"),
        ("--demo --do_sample False --seed 1 --prompt a", "--seed", "--do_sample False takes"),
        ("--demo --device cpu --cache_ratio 0.5", "--cache_ratio", "--device cpu"),
        ("--demo --accelerator none --prefetch off", "--prefetch", "--accelerator none"),
        ("--demo --device emulated --attention torch", "--attention", "CUDA graphs"),
        ("--demo --graphs off --attention torch", "--attention", "graphs are off"),
        ("--demo --prefetch off --look_ahead 2", "--look_ahead", "--prefetch off"),
        ("--demo --mrs_alpha 0.5", "--mrs_alpha", "--cache mrs"),
        ("--demo --mode long_context", "--mode", "need no mode"),
        ("--flash_pack p --tree_size 3", "--tree_size", "the tree lever has no size"),
        ("--flash_pack p --tree specinfer --tree_size 3", "--tree_size", "no size"),
        ("--flash_pack p --draft ngram --draft_bits 2", "--draft_bits", "the draft is ngram"),
        ("--tree chain --draft_bits 2", "--draft_bits", "the demo target has a draft of its own"),
        ("--flash_pack p --draft none --tree chain", "--tree", "no speculation"),
        ("--flash_pack p --tree none --draft ngram", "--draft", "no speculation"),
        ("--flash_pack p --tree none --overlap", "--overlap", "no speculation"),
        ("--flash_pack p --vram_budget 1GiB", "--vram_budget", "--device cuda"),
        ("--flash_pack p --device cpu --vram_budget 1GiB", "--vram_budget", "--device cuda"),
        ("--gguf_path g --vram_budget 1GiB", "--vram_budget", "--cache_bytes"),
    ],
)
def test_flags_that_others_make_idle_are_refused(
    flags: str, named: str, reason: str, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    code, after = outcome(recorder, flags.split())
    err = capsys.readouterr().err
    assert code == 2 and set(after) == {"seed"}
    verb = "have" if "," in named else "has"
    assert f"error: {named} {verb} no effect: " in err and reason in err


def test_flags_for_cached_experts_are_refused_where_there_is_no_accelerator(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "cuda_refusal", lambda: "torch sees no CUDA device")
    assert outcome(recorder, ["--demo", "--cache_ratio", "0.5"])[0] == 2
    err = capsys.readouterr().err
    assert "--cache_ratio has no effect: there is no accelerator here (torch sees no" in err
    # An emulated one may be asked for, also by rules of one's own.
    for beside in ("--device emulated", "--accelerator emulated", "--rules r.yaml"):
        assert outcome(recorder, ["--demo", "--cache_ratio", "0.5", *beside.split()])[0] == 0
    # Nothing of it concerns the CPU.
    assert outcome(recorder, ["--demo", "--graphs", "off", "--cpu_threads", "2"])[0] == 0


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--use_cuda_graph False", {"graphs": "off"}),
        ("--use_cuda_graph True", {"graphs": "auto"}),
        ("--cpu_infer 3", {"cpu_threads": 3}),
        ("--mode normal", {}),
    ],
)
def test_flags_of_ktransformers_have_their_effect(
    flags: str, settings: dict[str, Any], recorder: Recorder
) -> None:
    assert main(["local_chat", "--demo", *flags.split()]) == 0
    _, given = recorder.seen["load"]
    usual = ("dtype", "trust_rules", "progress", "require_tokenizer")
    assert {name: value for name, value in given.items() if name not in usual} == settings


@pytest.mark.parametrize("chat", CHATS)
def test_without_a_change_the_record_is_the_same(chat: str, recorder: Recorder) -> None:
    """Else the table above would prove nothing."""
    assert outcome(recorder, [*CHATS[chat]]) == outcome(recorder, [*CHATS[chat]])
