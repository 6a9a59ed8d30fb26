"""How fast is classic kTransformers with our rules and with its own, on this machine, in one run?

All are the real `ktransformers.local_chat` with the demo model, greedy, the same questions, in turns.
kTransformers' own `KExpertsCPU` runs on kt-kernel's prebuilt expert kernels. Our engine chooses its CPU backend itself;
`ours, kt` holds it to the same kernels, which tells how much of the difference is the backend. Rates are those that
`local_chat` prints. Everything is measured.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval import report
from hybrimoe_plugin.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent
SETS = ("ours", "ours, kt", "stock")
PACKAGED = ROOT / "optimize_rules" / "ktransformers" / "Mixtral-cpu.yaml"
SHORT = (
    "Tell me a long story about a fox who lives at the edge of a forest.",
    "Explain in many sentences how rain forms.",
    "Write a Python function that sorts a list, and explain every line.",
    "List ten tips for healthy living and give a reason for each.",
)
LONG = "Summarise this text: " + " ".join(
    f"In chapter {number} the travellers cross river {number}, count {number * 7} birds and write a letter home."
    for number in range(1, 13)
)
_LINES = re.compile(
    r"prompt eval count: +(?P<prompt>\d+).*?prompt eval rate: +(?P<prefill>[\d.]+).*?"
    r"eval count: +(?P<count>\d+).*?eval rate: +(?P<decode>[\d.]+)",
    re.DOTALL,
)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives what the JSON line says."""
    parser = report.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of kTransformers' own experts (default 1)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each set of rules is started (default 2)")
    args = parser.parse_args(arguments)
    python = interpreter()
    rounds, tokens = (1, 16) if args.quick else (args.rounds, 40)
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in SETS}
    with tempfile.TemporaryDirectory() as folder:
        flags = rules_flags(Path(folder), args.threads)
        for _ in range(rounds):
            for name in SETS:  # in turns, so that a slow spell of the machine meets all
                answers[name] += ask(python, [*flags[name], "--max_new_tokens", str(tokens)])
    rows = [
        {"rules": name, "measure": measure, **summary(answers[name], measure)}
        for measure in ("decode", "prefill, short prompts", "prefill, long prompt")
        for name in SETS
    ]
    report.show("local_chat with the demo model (measured, tokens per second)", rows)
    report.save_csv(args.out / "ktransformers_cpu.csv", [{**row, "label": "measured"} for row in rows])
    found = {(row["rules"], row["measure"].split(",")[0], row["measure"][-11:]): row["p50"] for row in rows}
    result = {
        "decode_ours": found["ours", "decode", "decode"],
        "decode_stock": found["stock", "decode", "decode"],
        "prefill_long_ours": found["ours", "prefill", "long prompt"],
        "prefill_long_stock": found["stock", "prefill", "long prompt"],
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


def interpreter() -> str:
    """The Python in whose environment ktransformers is installed.

    Raises:
        BackendError: there is none.
    """
    if importlib.util.find_spec("ktransformers") is not None:
        return sys.executable
    beside = ROOT / ".venv-ktransformers" / "bin" / "python"
    if not beside.exists():
        raise BackendError("no environment with ktransformers: python scripts/setup_ktransformers.py makes it")
    return str(beside)


def ask(python: str, flags: Sequence[str]) -> list[dict[str, float]]:
    """Rates of the answers of one process; the first, which warms up, is left out."""
    command = [python, "-m", "hybrimoe_plugin", "ktransformers_chat", "--demo", "--greedy", *flags]
    questions = [SHORT[0], *SHORT, LONG, LONG]
    done = subprocess.run(command, input="\n".join(questions), capture_output=True, text=True, check=False, cwd=ROOT)
    found = [{key: float(value) for key, value in match.groupdict().items()} for match in _LINES.finditer(done.stdout)]
    if done.returncode or len(found) != len(questions):
        raise BackendError(f"local_chat gave {len(found)} of {len(questions)} answers: {done.stderr[-500:]}")
    return found[1:]


def summary(answers: Sequence[dict[str, float]], measure: str) -> dict[str, Any]:
    """p20, p50 and p80 of one measure, with how many answers and prompt tokens it is of."""
    longest = max(answer["prompt"] for answer in answers)
    if measure == "decode":
        chosen = [answer for answer in answers if answer["count"] > 1]
    else:
        chosen = [answer for answer in answers if (answer["prompt"] == longest) == measure.endswith("long prompt")]
    rates = [answer["decode" if measure == "decode" else "prefill"] for answer in chosen]
    low, middle, high = (float(value) for value in np.percentile(rates, (20, 50, 80)))
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
