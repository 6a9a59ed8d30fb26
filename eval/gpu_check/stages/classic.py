"""The real `ktransformers.local_chat` 0.2.1 on the card, with our rules and with its own.

The model is the demo model. What its own rules get here is not what a compiled kTransformers gets.
From a pure-Python wheel there are neither Marlin kernels, so that its linears are torch's, as in
our rules, nor CUDA graphs, because its experts on the CPU come from kt-kernel's stand-in, which
cannot be captured. Every row of its rules says so.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from eval import ktransformers
from eval.gpu_bench.bench import CPU_THREADS
from eval.gpu_check.place import Place, Row
from eval.ktransformers import MEASURES, PACKAGED, PACKAGED_GPU, QUESTIONS, SHORT, Host
from hybrimoe_plugin.demo.build import build_demo_model
from hybrimoe_plugin.errors import BackendError, WeightsError
from hybrimoe_plugin.hosts.ktransformers.demo import _weights

ROUNDS = 2
TOKENS = 40
DRY_TOKENS = 4
DRY_QUESTIONS = (SHORT[0], SHORT[0])
DRY_SECONDS = 40.0
"""For both sets of rules together; a machine that needs longer says so instead."""
OURS, STOCK = "ours", "stock"
NOTES = {
    OURS: "",
    STOCK: "torch linears in place of Marlin, no CUDA graphs: both need a compiled kTransformers",
}
FORM = "mixtral"

Answers = dict[str, list[dict[str, float]]]


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    try:
        host = ktransformers.find_host()
        model = _demo(place)
        with tempfile.TemporaryDirectory() as folder:
            flags = _flags(place, host, Path(folder))
            yield {"case": "classic kTransformers", "detail": f"{model.name}, {_origin(host)}"}
            yield from _rounds(place, host, flags)
    except (BackendError, WeightsError) as error:
        yield {"case": "classic kTransformers", "ok": None, "missing": str(error)}


def _rounds(place: Place, host: Host, flags: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    """Both sets of rules in turns.

    After each turn the rows are of all answers so far, and replace earlier ones.
    """
    answers: Answers = {name: [] for name in flags}
    questions: Sequence[str] = QUESTIONS
    measures: Sequence[str] = MEASURES
    if place.dry:  # it asks no long question
        questions, measures = DRY_QUESTIONS, MEASURES[:1]
    rounds = 1 if place.dry else ROUNDS
    until = time.monotonic() + DRY_SECONDS
    for _ in range(rounds):
        for name, given in flags.items():
            try:
                limit_s = _left_s(until) if place.dry else None
                answers[name] += ktransformers.ask(host, given, questions, limit_s)
            except BackendError as error:
                # Our rules have to run on a card; kTransformers' own may lack what it would have
                # compiled.
                failed = name == OURS and not place.dry
                ok = False if failed else None
                yield {"case": f"local_chat, {name}", "ok": ok, "missing": str(error)}
                continue
            yield from _rates(name, answers, measures)
        yield from _ratios(answers, measures)


def _left_s(until: float) -> float:
    """Seconds that a dry run has left.

    Raises:
        BackendError: too few to start anything.
    """
    left = until - time.monotonic()
    if left < DRY_SECONDS / 8:
        raise BackendError("a dry run has no time left for this on this machine")
    return left


def _rates(name: str, answers: Answers, measures: Sequence[str]) -> Iterator[Row]:
    for measure in _measured(answers, measures, name):
        found = ktransformers.summary(answers[name], measure)
        yield {
            "case": f"{measure}, {name}",
            "tok_s_p20": found["p20"],
            "tok_s_p50": found["p50"],
            "tok_s_p80": found["p80"],
            "answers": found["answers"],
            "prompt_tokens": found["prompt_tokens"],
            "detail": NOTES[name],
        }


def _ratios(answers: Answers, measures: Sequence[str]) -> Iterator[Row]:
    for measure in _measured(answers, measures, OURS, STOCK):
        ours = ktransformers.summary(answers[OURS], measure)
        stock = ktransformers.summary(answers[STOCK], measure)
        ratio = ours["p50"] / stock["p50"]
        yield {"case": f"{measure}, ours / stock", "ratio": ratio, "detail": NOTES[STOCK]}


def _measured(answers: Answers, measures: Sequence[str], *names: str) -> list[str]:
    """Those that all of these sets of rules have answers for."""
    found = []
    for measure in measures:
        if all(ktransformers.answers_of(answers[name], measure) for name in names):
            found.append(measure)
    return found


def _origin(host: Host) -> str:
    """Where ktransformers comes from, without this machine's folders."""
    if not host.site:
        return "an environment of its own"
    return f"packages in the folder {Path(host.site).name}"


def _flags(place: Place, host: Host, folder: Path) -> dict[str, list[str]]:
    """The flags that each set of rules is started with.

    Raises:
        BackendError: ktransformers has no rules for the demo model.
    """
    cores = min(CPU_THREADS, len(os.sched_getaffinity(0)))
    threads = max(1, cores - 1)
    tokens = ["--max_new_tokens", str(DRY_TOKENS if place.dry else TOKENS)]
    ours, stock = PACKAGED_GPU, str(_stock_rules(host, folder))
    if place.dry:
        # kTransformers' own rules name cuda, which our patches read as cpu where there is none.
        ours, stock = PACKAGED, "stock"
    return {
        OURS: ["--optimize_rule_path", str(ours), *tokens],
        STOCK: ["--optimize_rule_path", stock, "--cpu_infer", str(threads), *tokens],
    }


def _stock_rules(host: Host, folder: Path) -> Path:
    """kTransformers' own rules for the demo model's family, with torch's linears."""
    find = (
        "import importlib.util as u; "
        "print(*u.find_spec('ktransformers').submodule_search_locations)"
    )
    done = subprocess.run(
        [host.python, "-c", find],
        capture_output=True,
        text=True,
        check=False,
        env=host.environment,
        cwd=folder,
    )
    theirs = Path(done.stdout.strip()) / "optimize" / "optimize_rules" / "Mixtral.yaml"
    if done.returncode or not theirs.is_file():
        reason = done.stderr.strip()[-200:] or theirs.name
        raise BackendError(f"no rules of kTransformers' own are found: {reason}")
    made = folder / "Mixtral-stock-torch.yaml"
    text = theirs.read_text(encoding="utf-8")
    made.write_text(text.replace("KLinearMarlin", "KLinearTorch"), encoding="utf-8")
    return made


def _demo(place: Place) -> Path:
    """The demo model. A dry run has no time to build it.

    Raises:
        WeightsError: it cannot be built here, or was not.
    """
    if place.dry:
        return _weights(FORM)
    return build_demo_model(FORM, progress=False)
