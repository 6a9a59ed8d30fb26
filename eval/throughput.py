"""How fast does an injected model answer on this machine, compared with llama.cpp and ik_llama.cpp?

All run the same file with as many threads. Measured: TTFT of a prompt, TBT over single tokens,
percent of the roofline. The systems take turns in one run, so that a change in the machine's speed
affects all of them alike, and each number is a median over the turns. `same_token` is the share of
positions at which a system finds the same token likeliest as ours does: a program that computes
something else is no comparison.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from eval.models import files
from eval.peers import peer, roofline
from eval.reporting import plots, report
from eval.reporting.finished import add_fresh
from eval.reporting.quantiles import percentiles
from eval.reporting.rows import column
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name
from hybrimoe_plugin.errors import BackendError

PROMPT_TOKENS = 128
CONTEXT = 2048
"""Tokens that a peer has room for at least."""
SLICES: files.Slices = {
    # llama.cpp takes DeepSeek-V2-Lite by its 27 layers alone,
    # so that slice is one of experts; a token's work is the whole model's.
    "deepseek-v2-lite": (27, 16),
    "qwen2-57b-a14b": (2, None),
    "qwen3-30b-a3b": (4, None),
    "mixtral-8x7b": (1, None),
}
OURS, PLAIN = "HybriMoE", "plain operators"
LLAMA, IK = PEERS = peer.LLAMA_CPP.name, peer.IK_LLAMA_CPP.name
LEAST_SAME = 0.25
"""`same_token` below this comes with a warning: kernels round differently, and random tokens leave
close calls to rounding, but not so many.
"""
TWINS: dict[str, dict[str, Any]] = {
    OURS: {},
    "ggml's graphs": {"cpu_backend": "ggml"},
    "module by module": {"graphs": "off"},
    "plain linears": {"dense": "dequantised", "dtype": "bfloat16"},
    PLAIN: {"dense": "plain", "dtype": "bfloat16"},
    "kt-kernel workers, plain operators": {
        "dense": "plain",
        "dtype": "bfloat16",
        "cpu_backend": "kt",
    },
}


class Turn(NamedTuple):
    """One system's turn."""

    prefill_s: float
    """Until the prompt's last logits."""
    step_s: list[float]
    """Of each single token."""
    likeliest: Sequence[int] = ()
    """Next token with the largest logit, after the prompt and after each single token."""


Measure = Callable[[Sequence[int], Sequence[int]], Turn]
"""Takes the prompt's ids, and ids that are then fed one by one."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives the contents of the JSON line."""
    args = _parser().parse_args(arguments)
    if args.device == "cuda":
        from eval.cuda import question as cuda

        answer: dict[str, Any] = cuda.run(args)
        return answer
    torch.set_num_threads(args.threads)
    name, gguf = files.chosen(args, SLICES)
    rows, notes = measure(args, gguf)
    file = f"throughput_{name}"
    if args.prompt_tokens != PROMPT_TOKENS:
        file += f"_{args.prompt_tokens}-tokens"
    work = f"{args.prompt_tokens} prompt tokens, {args.steps} steps, {args.turns} turns"
    report.publish(f"{name}: {work} (measured)", rows, args.out / file, draw, height=3.2)
    result = summary(name, rows, args.threads, notes)
    report.finish(result)
    return result


def _parser() -> ArgumentParser:
    parser = report.parser(__doc__ or "")
    files.add_options(parser)
    parser.add_argument(
        "--trace", type=Path, help="take the routing from a recorded trace (without peers then)"
    )
    parser.add_argument("--prompt_tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument(
        "--steps",
        type=int,
        help="single tokens after the prompt in each turn (default 24, quick 10)",
    )
    parser.add_argument("--turns", type=int, help="turns of each system (default 4, quick 2)")
    parser.add_argument(
        "--twins", action="store_true", help="measure the plain twins of our operators too"
    )
    parser.add_argument(
        "--peer_python", default=sys.executable, help="interpreter that has llama-cpp-python"
    )
    parser.add_argument(
        "--ik_python",
        default=str(report.ROOT / ".venv-ik" / "bin" / "python"),
        help="interpreter that has ik-llama-cpp-python (default: that of .venv-ik)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_fresh(parser)
    return parser


def measure(args: Namespace, gguf: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(one row per system, peer -> a note on it). Sets `steps` and `turns` where not given."""
    args.steps = args.steps or (10 if args.quick else 24)
    args.turns = args.turns or (2 if args.quick else 4)
    config = _config(args, gguf)
    bound_ms = _bound_ms(args, gguf, config)
    peers = _peers(args, gguf)
    prompt, steps = _ids(args, config.vocab_size)
    times: dict[str, list[Turn]] = {}
    twins = TWINS if args.twins else {OURS: TWINS[OURS]}
    for name, settings in twins.items():
        try:
            run, close = _ours(args, gguf, settings)
        except BackendError as error:
            if name == OURS:
                raise
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        run(prompt, steps[:3])
        for _ in range(args.turns):
            times.setdefault(name, []).append(run(prompt, steps))
            if name == OURS:  # peers take turns with ours; the twins come after
                for peer_name, answer in peers.ask(prompt, steps).items():
                    times.setdefault(peer_name, []).append(Turn(**answer))
        close()
    peers.close()
    rows = [_row(name, turns, len(prompt), bound_ms) for name, turns in times.items()]
    for row in rows:
        name, same = row["system"], _same(times[row["system"]][0], times[OURS][0])
        row["same_token"] = same
        if same < LEAST_SAME:
            peers.remark(name, f"finds another likeliest token than ours at {1 - same:.0%}")
    return rows, peers.notes


def _same(turn: Turn, ours: Turn) -> float:
    """Share of positions at which both find the same token likeliest."""
    pairs = list(zip(turn.likeliest, ours.likeliest, strict=True))
    return sum(theirs == mine for theirs, mine in pairs) / len(pairs)


def _bound_ms(args: Namespace, gguf: Path, config: Any) -> float:
    """Time that a token's bytes need at this machine's read bandwidth; printed."""
    needed = roofline.token_bytes(gguf, config)
    gbps = roofline.read_gbps(args.threads)
    bound_ms = needed / gbps / 1e6
    print(
        f"roofline: {needed / 1e6:.0f} MB per token at {gbps:.1f} GB/s with {args.threads} "
        f"threads: {bound_ms:.1f} ms\n"
        "(main memory's bandwidth; a model that the last-level cache holds may pass it)",
        flush=True,
    )
    return bound_ms


def _peers(args: Namespace, gguf: Path) -> peer.Peers:
    """The peers that can run this."""
    peers = peer.Peers()
    pythons = {peer.LLAMA_CPP: args.peer_python, peer.IK_LLAMA_CPP: args.ik_python}
    context = max(CONTEXT, args.prompt_tokens + args.steps)
    for program, python in pythons.items():
        if args.trace is not None:
            peers.notes[program.name] = f"{program.name} cannot take its routing from a trace"
        else:
            peers.add(program, python, gguf, args.threads, context)
    return peers


def _ours(
    args: Namespace, gguf: Path, settings: dict[str, Any]
) -> tuple[Measure, Callable[[], None]]:
    """(measure, give back) of an injected model."""
    from hybrimoe_plugin import load_model

    torch.set_num_threads(args.threads)
    model, _ = load_model(args.model_path, gguf, progress=False, accelerator="none", **settings)
    if args.trace is not None:
        from eval.models.forced import route_by

        route_by(model, args.trace)
    keyword = cache_name(model)

    @torch.inference_mode()
    def run(prompt: Sequence[int], steps: Sequence[int]) -> Turn:
        started = time.perf_counter()
        out = model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        turn = Turn(time.perf_counter() - started, [], likeliest := [_likeliest(out)])
        for token in steps:
            started = time.perf_counter()
            kept = {keyword: cache_in(out)}
            out = model(torch.tensor([[token]]), **kept, use_cache=True, logits_to_keep=1)
            turn.step_s.append(time.perf_counter() - started)
            likeliest.append(_likeliest(out))
        return turn

    def close() -> None:
        nonlocal model
        model.hybrimoe.close()
        model = None
        gc.collect()

    return run, close


def _likeliest(out: Any) -> int:
    return int(out.logits[0, -1].argmax())


def _row(name: str, turns: Sequence[Turn], prompt: int, bound_ms: float) -> dict[str, Any]:
    """One system's row.

    Args:
        prompt: its length in tokens.
        bound_ms: time of a token that the roofline allows.
    """
    steps_ms: list[float] = []
    for turn in turns:
        steps_ms += [1e3 * step for step in turn.step_s]
    low, middle, high = percentiles(steps_ms)
    ttft = statistics.median(turn.prefill_s for turn in turns)
    return {
        "system": name,
        "prompt_tokens": prompt,
        "ttft_ms": 1e3 * ttft,
        "prefill_tok_s": prompt / ttft,
        "tbt_ms_p20": low,
        "tbt_ms_p50": middle,
        "tbt_ms_p80": high,
        "decode_tok_s": 1e3 / middle,
        "roofline_share": bound_ms / middle,
    }


def summary(
    name: str, rows: Sequence[dict[str, Any]], threads: int, notes: Mapping[str, str]
) -> dict[str, Any]:
    """What the JSON line says; ratios against what did not run are null.

    Args:
        notes: on each peer.
    """
    by_name = {row["system"]: row for row in rows}
    ours = by_name[OURS]

    def ratio(others: Sequence[str], figure: str) -> float | None:
        """Ours over the fastest of these that ran."""
        found = [by_name[other][figure] for other in others if other in by_name]
        return float(ours[figure] / max(found)) if found else None

    return {
        "model": name,
        "threads": threads,
        "decode_vs_llama_cpp": ratio([LLAMA], "decode_tok_s"),
        "prefill_vs_llama_cpp": ratio([LLAMA], "prefill_tok_s"),
        "decode_vs_ik_llama_cpp": ratio([IK], "decode_tok_s"),
        "prefill_vs_ik_llama_cpp": ratio([IK], "prefill_tok_s"),
        "decode_vs_fastest_peer": ratio(PEERS, "decode_tok_s"),
        "prefill_vs_fastest_peer": ratio(PEERS, "prefill_tok_s"),
        "decode_tok_s": ours["decode_tok_s"],
        "prefill_tok_s": ours["prefill_tok_s"],
        "ttft_ms": ours["ttft_ms"],
        "tbt_ms_p50": ours["tbt_ms_p50"],
        "roofline_share": ours["roofline_share"],
        "decode_vs_plain_operators": ratio([PLAIN], "decode_tok_s"),
        "llama_cpp": notes.get(LLAMA, ""),
        "ik_llama_cpp": notes.get(IK, ""),
    }


def _config(args: Namespace, gguf: Path) -> Any:
    from hybrimoe_plugin.hosts.transformers.config import model_config
    from hybrimoe_plugin.weights.gguf_store import GGUFStore

    return model_config(args.model_path, GGUFStore.open(gguf))


def _ids(args: Namespace, vocabulary: int) -> tuple[list[int], list[int]]:
    """(prompt, steps): random tokens, the same for all systems.

    What they say does not matter, but the routing should vary.
    """
    count = args.prompt_tokens + args.steps
    drawn = np.random.default_rng(0).integers(3, vocabulary, count).tolist()
    return drawn[: args.prompt_tokens], drawn[args.prompt_tokens :]


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Decode speed, one bar for each system."""
    names = ["ours" if name == OURS else name for name in column(rows, "system")]
    plots.bars(axes, names, column(rows, "decode_tok_s"), "{:.3g}")
    axes.set_title("Decode speed on the CPU alone")
    axes.set_xlabel("tokens per second (measured)")


if __name__ == "__main__":
    main()
