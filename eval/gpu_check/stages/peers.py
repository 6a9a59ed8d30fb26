"""llama.cpp and FreeToken on the check's model, with the same bytes of experts on the card as ours.

Peers take no given routing, so here the routers choose, ours too, and all tokens are random.
Decoding is timed behind a prompt, with one synchronisation a token; a rate is the median over
repetitions.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.gpu_bench.bench import CPU_THREADS
from eval.gpu_check.check_model import model_file
from eval.gpu_check.place import Place, Row
from eval.peers import freetoken_child
from eval.peers.interpreters import can_import
from eval.peers.llama_bench import LlamaBench, LlamaBenchError, last_line
from eval.reporting.quantiles import percentiles
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name
from hybrimoe_plugin.weights.gguf_store import GGUFStore

OURS, LLAMA, FREETOKEN = "ours", "llama.cpp", "FreeToken"
LLAMA_BENCH = "llama-bench"
LLAMA_HOW_TO_GET = (
    "no llama-bench on the PATH: build llama.cpp (b11480 or later has the expert "
    "cache) with -DGGML_CUDA=ON"
)
FREETOKEN_PYTHON = "HYBRIMOE_FREETOKEN_PYTHON"
"""Environment variable: an interpreter that has FreeToken, which wants a torch of its own."""
FREETOKEN_HOW_TO_GET = (
    f"freetoken cannot be imported: pip install 'freetoken[accel]' into an environment of its "
    f"own, and give its Python "
    f"as {FREETOKEN_PYTHON}"
)
FREETOKEN_TIMEOUT_S = 120.0

Rates = dict[str, list[float]]
"""What was measured -> tokens/s of each repetition."""


class Work(NamedTuple):
    """What everyone does."""

    prompts: tuple[int, ...]
    generated: int
    depth: int
    """Tokens before the first generated one."""
    repetitions: int


WORK = Work((128, 512), 64, 128, 5)
DRY_WORK = Work((8, 24), 4, 8, 2)
DRY_SETTINGS = {
    "accelerator": "emulated",
    "dense": "dequantised",
    "cpu_backend": "torch",
    "dtype": "float32",
    "profile": "a6000-deepseek-v2-lite",
}


class Subject(NamedTuple):
    """The file that everyone reads."""

    path: Path
    layers: int
    vocabulary: int
    cached_bytes: int
    """Half of what its experts take."""

    @classmethod
    def of(cls, path: Path) -> Subject:
        """Read what the comparison needs to know from the file."""
        store = GGUFStore.open(path)
        experts = [info for name, info in store.tensors.items() if "_exps." in name]
        expert_bytes = sum(info.nbytes for info in experts)
        layers = int(store.metadata[f"{store.architecture}.block_count"])
        vocabulary = store.info("token_embd.weight").shape[0]
        return cls(path, layers, vocabulary, expert_bytes // 2)


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    work = DRY_WORK if place.dry else WORK
    subject = Subject.of(model_file(place))
    yield {
        "case": "what is compared",
        "cached_gb": subject.cached_bytes / 1e9,
        "layers": subject.layers,
        "detail": f"{subject.path.name}, half of its experts' bytes on the card, routers choose, "
        f"random tokens",
    }
    ours, settings = measure_ours(place, subject, work)
    gc.collect()
    if not place.dry:
        torch.cuda.empty_cache()  # the peers, processes of their own, need the memory
    yield from rows(OURS, ours, work, settings)
    for name, peer in ((LLAMA, _llama), (FREETOKEN, _freetoken)):
        theirs: Rates = {}
        yield from peer(subject, work, theirs)
        yield from ratios(place, name, ours, theirs)


def rows(system: str, rates: Rates, work: Work, facts: Mapping[str, Any]) -> Iterator[Row]:
    """One for each thing that was measured."""
    for what, found in rates.items():
        low, middle, high = percentiles(found)
        row: dict[str, Any] = {
            "case": f"{system} {what}",
            "tok_s": middle,
            "tok_s_p20": low,
            "tok_s_p80": high,
            "repetitions": len(found),
        }
        if what == "decode":
            row["generated_tokens"] = work.generated
            row["depth_tokens"] = work.depth
        yield {**row, **facts}


def ratios(place: Place, name: str, ours: Rates, theirs: Rates) -> Iterator[Row]:
    """Ours over theirs, of medians."""
    for what in theirs:
        case = f"{what}, ours / {name}"
        if place.dry:
            missing = "a card: ours ran on the emulated accelerator"
            yield {"case": case, "ok": None, "missing": missing}
            continue
        ratio = statistics.median(ours[what]) / statistics.median(theirs[what])
        yield {"case": case, "ratio": ratio}


def measure_ours(place: Place, subject: Subject, work: Work) -> tuple[Rates, dict[str, Any]]:
    """(rates, what belongs in the rows)."""
    from hybrimoe_plugin import load_model

    settings: dict[str, Any] = {"accelerator": "cuda", "cpu_threads": max(1, _threads() - 1)}
    if place.dry:
        settings = DRY_SETTINGS
    settings = {"cache_bytes": subject.cached_bytes, **settings}
    model, _ = load_model(None, subject.path, progress=False, **settings)
    try:
        rates, hit_rate = _our_rates(model, subject, work)
    finally:
        model.hybrimoe.restore()
    return rates, {"hit_rate": hit_rate, "settings": _words(settings)}


@torch.no_grad()
def _our_rates(model: Any, subject: Subject, work: Work) -> tuple[Rates, float]:
    """(rates, share of cached experts among those used after the warm-up)."""
    (engine,) = model.hybrimoe.engines
    keyword = cache_name(model)
    generator = torch.Generator().manual_seed(0)

    def step(tokens: int, cache: Any) -> tuple[float, Any]:
        """(seconds, KV cache) of one pass over random tokens."""
        drawn = torch.randint(3, subject.vocabulary, (1, tokens), generator=generator)
        ids = drawn.to(model.device)
        engine.accelerator.synchronize()
        started = time.perf_counter()
        out = model(ids, **{keyword: cache}, use_cache=True, logits_to_keep=1)
        engine.accelerator.synchronize()
        return time.perf_counter() - started, cache_in(out)

    def turn() -> dict[str, float]:
        found = {}
        for prompt in work.prompts:
            spent, _ = step(prompt, None)
            found[_prompt(prompt)] = prompt / spent
        _, cache = step(work.depth, None)
        total = 0.0
        for _ in range(work.generated):
            spent, cache = step(1, cache)
            total += spent
        return {"decode": work.generated / total, **found}

    turn()  # warms up: kernels are compiled, graphs captured, the cache filled
    before = engine.controller.counters.snapshot()
    turns = [turn() for _ in range(work.repetitions)]
    rates = {what: [found[what] for found in turns] for what in turns[0]}
    return rates, engine.controller.counters.since(before).hit_rate


def _llama(subject: Subject, work: Work, found: Rates) -> Iterator[Row]:
    """llama.cpp's rows. Mutates: `found`."""
    path = shutil.which(LLAMA_BENCH)
    if path is None:
        yield {"case": LLAMA, "ok": None, "missing": LLAMA_HOW_TO_GET}
        return
    try:
        bench = LlamaBench(path)
        placement = bench.placement(subject.cached_bytes, subject.layers)
        command = bench.command(subject.path, placement, _threads(), work.repetitions)
        # What stands between the tool and what it measures, without this machine's folders.
        facts = {"settings": " ".join(command[3:]), "detail": placement.note}
        decode = bench.measure(command, (), work.generated, work.depth)
        facts["version"] = decode[0].version
        found["decode"] = decode[-1].tok_s
        yield from rows(LLAMA, {"decode": decode[-1].tok_s}, work, facts)
        prompts = bench.measure(command, work.prompts, 0, 0)
        rates = {_prompt(test.prompt_tokens): test.tok_s for test in prompts}
        found.update(rates)
        yield from rows(LLAMA, rates, work, facts)
    except LlamaBenchError as error:
        yield {"case": LLAMA, "ok": None, "missing": f"llama-bench: {error}"}


def _freetoken(subject: Subject, work: Work, found: Rates) -> Iterator[Row]:
    """FreeToken's rows. Mutates: `found`."""
    python = os.environ.get(FREETOKEN_PYTHON) or sys.executable
    if not can_import(python, "freetoken"):
        yield {"case": FREETOKEN, "ok": None, "missing": FREETOKEN_HOW_TO_GET}
        return
    request = {
        "gguf": str(subject.path),
        "cache_bytes": subject.cached_bytes,
        "vocabulary": subject.vocabulary,
        **work._asdict(),
    }
    child = Path(freetoken_child.__file__).resolve()
    answer, problem = _ask([python, str(child), json.dumps(request)])
    if problem:
        missing = f"FreeToken does not run on this file: {problem}"
        yield {"case": FREETOKEN, "ok": None, "missing": missing}
        return
    version = answer.pop("version")
    found.update(answer)
    facts = {
        "version": version,
        "settings": _words({"moe_cache_mem": subject.cached_bytes}),
        "detail": "its own strategy",
    }
    yield from rows(FREETOKEN, answer, work, facts)


def _ask(command: list[str]) -> tuple[dict[str, Any], str]:
    """(a process's JSON answer, why there is none)."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=FREETOKEN_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer after {FREETOKEN_TIMEOUT_S:.0f} s"
    if done.returncode:
        return {}, f"it ended with status {done.returncode}: {last_line(done.stderr)}"
    try:
        return json.loads(done.stdout), ""
    except ValueError:
        return {}, f"its answer cannot be read: {done.stdout[:200]!r}"


def _prompt(tokens: int) -> str:
    return f"prompt of {tokens}"


def _threads() -> int:
    """For every system alike."""
    return min(CPU_THREADS, len(os.sched_getaffinity(0)))


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
