"""The check's stage for peers: ours for real on the emulated accelerator, the others by programs in
their place.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.cuda_model.model_file import write
from eval.gpu_check.place import Place
from eval.gpu_check.stages import peers
from eval.models.routing import routing
from eval.models.shapes import MODELS
from eval.peers import llama_bench
from eval.peers.llama_bench import LlamaBench, LlamaBenchError
from hybrimoe_plugin.weights.gguf_store import GGUFStore

USAGE = """usage: llama-bench [options]
  -h, --help
  -r, --repetitions <n>                       number of times to repeat each test (default: 5)
  -o, --output <csv|json|jsonl|md|sql>        output format printed to stdout (default: md)
  -m, --model <filename>                      (default: models/7B/ggml-model-q4_0.gguf)
  -p, --n-prompt <n>                          (default: 512)
  -n, --n-gen <n>                             (default: 128)
  -d, --n-depth <n>                           (default: 0)
  -t, --threads <n>                           (default: 8)
  -ngl, --n-gpu-layers <n>                    (default: -1)
  -ncmoe, --n-cpu-moe <n>                     (default: 0)
{more}"""
CACHE = (
    "  --moe-cache-mib <n>                         (default: 0)\n  -lm, --load-mode "
    "<none|mmap>   (default: mmap)\n"
)
FORK = (
    "  --moe-cache <auto|on|off|0|MiB>             (default: auto)\n  -mmp, --mmap <0|1>      "
    "       (default: 1)\n"
)

PROGRAM = """#!{python}
import json, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(json.dumps(arguments), file=log)
if "--help" in arguments:
    print({usage!r})
    sys.exit(0)
known = set({usage!r}.replace(",", " ").split())
unknown = [word for word in arguments if word.startswith("-") and word not in known]
if unknown or {fails}:
    print("error: invalid parameter for argument:", *unknown, file=sys.stderr)
    sys.exit(1)
value = dict(zip(arguments, arguments[1:]))
lengths = [int(word) for word in value["-p"].split(",")]
tests = [(length, 0) for length in lengths if length] + [(0, int(value["-n"]))] * (value["-n"] != "0")
rates = [10.0, 40.0, 30.0][: int(value["-r"])] if int(value["-r"]) > 2 else [20.0, 30.0]
print("ggml_cuda_init: found 1 device", file=sys.stderr)
print(json.dumps([
    {{"build_commit": "abc1234", "build_number": 11505, "backends": "CUDA", "n_prompt": prompt, "n_gen": generated,
      "n_depth": int(value.get("-d", 0)), "avg_ts": 26.7, "samples_ts": [rate + prompt for rate in rates]}}
    for prompt, generated in tests
]))
"""  # noqa: E501


def install(
    folder: Path,
    usage: str,
    fails: bool = False,
) -> Path:
    """A `llama-bench` that checks its options against its usage; gives where it logs them."""
    log = folder / "asked.jsonl"
    program = folder / "llama-bench"
    program.write_text(
        PROGRAM.format(python=sys.executable, log=str(log), usage=usage, fails=fails)
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return log


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    given = routing(MODELS[0], 8, 10, look_ahead=3, recall=0.8)
    write(MODELS[0], given, 2, path, dry=True)
    return path


@pytest.fixture
def bare(
    tmp_path: Path,
    gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    """With nothing on the path and no FreeToken."""
    monkeypatch.setattr(peers, "model_file", lambda _place: gguf)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(peers.FREETOKEN_PYTHON, raising=False)
    return Place(tmp_path, tmp_path, dry=True)


@pytest.fixture
def place(
    bare: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    """Likewise, and ours is not measured, for tests of the others."""
    ours = {"decode": [1.0], "prompt of 8": [1.0], "prompt of 24": [1.0]}
    monkeypatch.setattr(peers, "measure_ours", lambda _place, _subject, _work: (ours, {}))
    return bare


def by_case(place: Place) -> dict[str, Any]:
    return {row["case"]: row for row in peers.run(place)}


def test_missing_peers_are_named_and_ours_is_measured(bare: Place) -> None:
    rows = by_case(bare)
    assert rows["llama.cpp"]["ok"] is None and "b11480" in rows["llama.cpp"]["missing"]
    assert (
        rows["FreeToken"]["ok"] is None and peers.FREETOKEN_PYTHON in rows["FreeToken"]["missing"]
    )
    work = peers.DRY_WORK
    for what in ("decode", *(f"prompt of {length}" for length in work.prompts)):
        row = rows[f"ours {what}"]
        assert (
            0 < row["tok_s_p20"] <= row["tok_s"] <= row["tok_s_p80"]
            and row["repetitions"] == work.repetitions
        )
    assert 0 < rows["ours decode"]["hit_rate"] < 1, "half of the experts are cached"


def test_the_budget_is_half_of_the_experts_bytes(gguf: Path) -> None:
    subject = peers.Subject.of(gguf)
    store = GGUFStore.open(gguf)
    stacked = [info for name, info in store.tensors.items() if name.endswith(("_exps.weight",))]
    assert len(stacked) == 3 * 2 and subject.layers == 2
    assert subject.cached_bytes == sum(info.nbytes for info in stacked) // 2
    assert subject.vocabulary == store.info("output.weight").shape[0]


def test_llama_bench_gets_the_same_bytes_and_work(
    place: Place,
    gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = install(place.out, USAGE.format(more=CACHE))
    monkeypatch.setattr(peers, "DRY_WORK", peers.DRY_WORK._replace(repetitions=3))
    mib = (300 << 20) + 5
    monkeypatch.setattr(
        peers.Subject,
        "of",
        classmethod(lambda _cls, path: peers.Subject(path, 2, 250, mib)),
        raising=True,
    )
    rows = by_case(place)
    _, decode, prefill = (json.loads(line) for line in log.read_text().splitlines())
    shared = ["-m", str(gguf), "-ngl", "99", "-ncmoe", "2", "--moe-cache-mib", "300"]
    threads = ["-t", str(peers._threads()), "--load-mode", "none", "-r", "3", "-o", "json"]
    assert decode == [*shared, *threads, "-p", "0", "-n", "4", "-d", "8"]
    assert prefill == [*shared, *threads, "-p", "8,24", "-n", "0"]
    row = rows["llama.cpp decode"]
    assert row["tok_s"] == 30.0, "the median, not the mean"
    assert (
        row["version"].startswith("b11505 (abc1234)") and "--moe-cache-mib 300" in row["settings"]
    )
    assert str(place.out) not in json.dumps(row), "no folder of this machine in a result"
    assert rows["llama.cpp prompt of 24"]["tok_s"] == 54.0
    assert rows["decode, ours / llama.cpp"]["ok"] is None, (
        "ours was emulated: there is nothing to compare"
    )


def test_ratios_are_of_medians_where_both_are_measured(place: Place) -> None:
    card = place._replace(dry=False)
    ours, theirs = (
        {"decode": [50.0, 60.0, 1.0], "prompt of 8": [1.0]},
        {"decode": [20.0, 30.0, 25.0]},
    )
    (row,) = peers.ratios(card, "llama.cpp", ours, theirs)
    assert row == {"case": "decode, ours / llama.cpp", "ratio": 2.0}


def test_without_a_cache_half_of_the_layers_stay_on_the_card(place: Place) -> None:
    install(place.out, USAGE.format(more=""))
    rows = by_case(place)
    assert "-ncmoe 1" in rows["llama.cpp decode"]["settings"]
    assert "no expert cache" in rows["llama.cpp decode"]["detail"]


def test_a_fork_s_cache_has_another_name(tmp_path: Path) -> None:
    install(tmp_path, USAGE.format(more=FORK))
    bench = LlamaBench(str(tmp_path / "llama-bench"))
    placement = bench.placement(700 << 20, 12)
    assert placement.flags == ["-ncmoe", "12", "--moe-cache", "700"]
    assert bench.command(tmp_path / "m.gguf", placement, 4, 5)[-6:] == [
        "--mmap",
        "0",
        "-r",
        "5",
        "-o",
        "json",
    ]


@pytest.mark.parametrize(
    ("usage", "fails", "reason"),
    [
        (USAGE.format(more=""), True, "status 1"),
        ("usage: llama-bench -m MODEL", False, "no --n-cpu-moe"),
    ],
)
def test_one_that_does_not_work_is_missing(
    place: Place,
    usage: str,
    fails: bool,
    reason: str,
) -> None:
    install(place.out, usage, fails)
    row = by_case(place)["llama.cpp"]
    assert row["ok"] is None and reason in row["missing"]


@pytest.mark.parametrize("output", ["", "[", "{}", '[{"n_prompt": 1}]', "no model"])
def test_answers_that_cannot_be_read_say_so(output: str) -> None:
    with pytest.raises(LlamaBenchError, match="cannot be read"):
        llama_bench.answers(output)


FREETOKEN = {
    "__init__": '__version__ = "0.2.1"\n',
    "core": """
class SamplingParams:
    def __init__(self, temperature, ignore_eos, max_tokens):
        assert temperature > 0 and ignore_eos
        self.max_tokens = max_tokens
""",
    "scheduler/__init__": "",
    "scheduler/scheduler": """
def load_tokenizer(path):
    raise ValueError("no tokenizer in this file")
load_eos_token_ids = load_tokenizer
""",
    "llm": """
import json, pathlib
from freetoken.scheduler import scheduler

class Message:
    next_token = 5

class Admitted:
    pass

class LLM:
    def __init__(self, model_path, **options):
        self.tokenizer = scheduler.load_tokenizer(model_path)
        self.stops = scheduler.load_eos_token_ids(model_path, self.tokenizer)
        print("a log line on standard output")
        pathlib.Path(__file__).with_name("options.json").write_text(json.dumps(options))

    def generate(self, prompts, wanted):
        assert all(3 <= token < 256 for prompt in prompts for token in prompt) and not self.stops
        self.offline_send_result([Admitted()])
        for _ in range(wanted.max_tokens - FEWER):
            self.offline_send_result([Message()])
        assert self.tokenizer.decode([1]) == ""

    def offline_send_result(self, reply):
        pass
""",
}


def freetoken(
    folder: Path,
    fewer: int = 0,
) -> Path:
    """A package in FreeToken's place with the signatures of 0.2.1; gives where it writes its
    options.
    """
    for name, text in FREETOKEN.items():
        path = folder / "site" / "freetoken" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("FEWER", str(fewer)))
    return folder / "site" / "freetoken" / "options.json"


def test_freetoken_is_asked_for_the_same(
    place: Place,
    gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = freetoken(place.out)
    monkeypatch.setenv("PYTHONPATH", str(place.out / "site"))
    rows = by_case(place)
    given = json.loads(options.read_text())
    assert given["moe_cache_mem"] == peers.Subject.of(gguf).cached_bytes
    assert given["cache_type"] == "naive" and given["max_seq_len_override"] >= 24 + 4 + 1
    for what in ("decode", "prompt of 8", "prompt of 24"):
        row = rows[f"FreeToken {what}"]
        assert row["tok_s"] > 0 and row["version"] == "0.2.1" and row["repetitions"] == 2
        assert rows[f"{what}, ours / FreeToken"]["ok"] is None


def test_freetoken_that_breaks_is_missing(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freetoken(place.out, fewer=1)
    monkeypatch.setenv("PYTHONPATH", str(place.out / "site"))
    row = by_case(place)["FreeToken"]
    assert row["ok"] is None and "gave 0 of 1 tokens" in row["missing"]
