"""How fast is classic kTransformers with our rules and with its own, on this machine, in one run?

All are the real `ktransformers.local_chat` with the demo model, greedy, the same questions, in
turns. kTransformers' own `KExpertsCPU` runs on kt-kernel's prebuilt expert kernels. Our engine
chooses its CPU backend itself; `ours, kt` holds it to the same kernels, which tells how much of the
difference is the backend. Rates are those that `local_chat` prints. Everything is measured.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from eval.reporting import report
from eval.reporting.quantiles import percentiles
from hybrimoe_plugin.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent
SETS = ("ours", "ours, kt", "stock")
PACKAGED = ROOT / "optimize_rules" / "ktransformers" / "Mixtral-cpu.yaml"
PACKAGED_GPU = PACKAGED.with_name("Mixtral-gpu.yaml")
SITE = "HYBRIMOE_CLASSIC_SITE"
"""Environment variable: a folder of packages with classic kTransformers, for the Python that runs
this.
"""
SHORT = (
    "Tell me a long story about a fox who lives at the edge of a forest.",
    "Explain in many sentences how rain forms.",
    "Write a Python function that sorts a list, and explain every line.",
    "List ten tips for healthy living and give a reason for each.",
)
LONG = "Summarise this text: " + " ".join(
    f"In chapter {number} the travellers cross river {number}, count {number * 7} birds and write "
    f"a letter home."
    for number in range(1, 13)
)
QUESTIONS = (SHORT[0], *SHORT, LONG, LONG)
"""What `ask` asks; the first warms up."""
DECODE, SHORT_PREFILL, LONG_PREFILL = "decode", "prefill, short prompts", "prefill, long prompt"
MEASURES = (DECODE, SHORT_PREFILL, LONG_PREFILL)
_LINES = re.compile(
    r"prompt eval count: +(?P<prompt>\d+).*?prompt eval rate: +(?P<prefill>[\d.]+).*?"
    r"eval count: +(?P<count>\d+).*?eval rate: +(?P<decode>[\d.]+)",
    re.DOTALL,
)


class Host(NamedTuple):
    """Where classic kTransformers runs."""

    python: str
    """An interpreter."""
    site: str = ""
    """A folder that comes first on its path; empty for none."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for its processes.

        Triton's interpreter, which a dry run asks for, is left out: the host has a stand-in for
        Triton.
        """
        values = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if self.site:
            path = [self.site, *filter(None, [values.get("PYTHONPATH")])]
            values["PYTHONPATH"] = os.pathsep.join(path)
        return values


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives the contents of the JSON line."""
    parser = report.parser((__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of kTransformers' own experts (default 1)"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often each set of rules is started (default 2)"
    )
    args = parser.parse_args(arguments)
    host = find_host()
    rounds, tokens = (1, 16) if args.quick else (args.rounds, 40)
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in SETS}
    with tempfile.TemporaryDirectory() as folder:
        flags = rules_flags(Path(folder), args.threads)
        for _ in range(rounds):
            for name in SETS:  # in turns, so that a slow spell of the machine meets all
                answers[name] += ask(host, [*flags[name], "--max_new_tokens", str(tokens)])
    rows = [
        {"rules": name, "measure": measure, **summary(answers[name], measure)}
        for measure in MEASURES
        for name in SETS
    ]
    report.show("local_chat with the demo model (measured, tokens per second)", rows)
    report.save_csv(
        args.out / "ktransformers_cpu.csv", [{**row, "label": "measured"} for row in rows]
    )
    found = {(row["rules"], row["measure"]): row["p50"] for row in rows}
    result = {
        "decode_ours": found["ours", DECODE],
        "decode_stock": found["stock", DECODE],
        "prefill_long_ours": found["ours", LONG_PREFILL],
        "prefill_long_stock": found["stock", LONG_PREFILL],
    }
    report.finish(result)
    return result


def rules_flags(folder: Path, threads: int) -> dict[str, list[str]]:
    """What each set of rules is started with."""
    rules = yaml.safe_load(PACKAGED.read_text(encoding="utf-8"))
    for rule in rules:
        if rule["replace"]["class"].endswith(".HybriMoEExperts"):
            rule["replace"]["kwargs"]["cpu_backend"] = "kt"
    held = folder / "kt.yaml"
    held.write_text(yaml.safe_dump(rules), encoding="utf-8")
    return {
        "ours": ["--optimize_rule_path", str(PACKAGED)],
        "ours, kt": ["--optimize_rule_path", str(held)],
        "stock": ["--optimize_rule_path", "stock", "--cpu_infer", str(threads)],
    }


def find_host() -> Host:
    """The Python that has classic kTransformers.

    It is this one with the folder that `SITE` names, this environment, or the environment that
    `make setup-ktransformers` makes.

    Raises:
        BackendError: there is none.
    """
    site = os.environ.get(SITE)
    if site:
        if not (Path(site) / "ktransformers").is_dir():
            raise BackendError(f"{SITE}={site}: there is no ktransformers in that folder")
        return Host(sys.executable, str(Path(site).resolve()))
    if importlib.util.find_spec("ktransformers") is not None:
        return Host(sys.executable)
    beside = ROOT / ".venv-ktransformers" / "bin" / "python"
    if not beside.exists():
        raise BackendError("no environment with ktransformers here: make setup-ktransformers")
    return Host(str(beside))


def ask(
    host: Host,
    flags: Sequence[str],
    questions: Sequence[str] = QUESTIONS,
    timeout_s: float | None = None,
) -> list[dict[str, float]]:
    """Rates of the answers of one process; the first, which warms up, is left out.

    Raises:
        BackendError: an answer is missing, or the process took longer than `timeout_s`.
    """
    command = [host.python, "-m", "hybrimoe_plugin", "ktransformers_chat"]
    command += ["--demo", "--greedy", *flags]
    try:
        done = subprocess.run(
            command,
            input="\n".join(questions),
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=host.environment,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(
            f"local_chat needed more than {timeout_s:.0f} s for {len(questions)} questions"
        ) from error
    found = []
    for match in _LINES.finditer(done.stdout):
        rates = match.groupdict()
        found.append({name: float(text) for name, text in rates.items()})
    if done.returncode or len(found) != len(questions):
        raise BackendError(
            f"local_chat gave {len(found)} of {len(questions)} answers: {done.stderr[-500:]}"
        )
    return found[1:]


def answers_of(answers: Sequence[dict[str, float]], measure: str) -> list[dict[str, float]]:
    """The answers that count for one of `MEASURES`; the longest prompt is the long one."""
    if measure == DECODE:
        return [answer for answer in answers if answer["count"] > 1]
    longest = max((answer["prompt"] for answer in answers), default=0.0)
    if measure == LONG_PREFILL:
        return [answer for answer in answers if answer["prompt"] == longest]
    return [answer for answer in answers if answer["prompt"] != longest]


def summary(answers: Sequence[dict[str, float]], measure: str) -> dict[str, Any]:
    """p20, p50 and p80 of one measure, and how many answers and prompt tokens it is of.

    There must be one answer at least.
    """
    chosen = answers_of(answers, measure)
    phase = "decode" if measure == DECODE else "prefill"
    low, middle, high = percentiles([answer[phase] for answer in chosen])
    prompts = sorted(int(answer["prompt"]) for answer in chosen)
    return {
        "answers": len(chosen),
        "prompt_tokens": f"{prompts[0]} to {prompts[-1]}",
        "p20": low,
        "p50": middle,
        "p80": high,
        "unit": "tokens/s",
    }


if __name__ == "__main__":
    main()
