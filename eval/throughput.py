"""How fast does an injected model answer on this machine, beside llama.cpp on the same file and
thread count?

Measured: TTFT of a prompt, TBT over single tokens, percent of the roofline. The systems take turns
in one run, so that a change in the machine's mood meets all of them, and each number is a median
over the turns.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval import peer, report, roofline, synthetic
from eval.finished import add_fresh
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name
from hybrimoe_plugin.errors import BackendError

PROMPT_TOKENS = 128
CONTEXT = 2048
"""Tokens that llama.cpp has room for at least."""
MODELS = ("demo", *synthetic.SHAPES)
SLICES: dict[str, tuple[int, int | None]] = {
    # (layers, routed experts) by default: llama.cpp takes DeepSeek-V2-Lite by its 27 layers alone,
    # so that slice is one of experts; a token's work is the whole model's.
    "deepseek-v2-lite": (27, 16),
    "qwen2-57b-a14b": (2, None),
    "qwen3-30b-a3b": (4, None),
    "mixtral-8x7b": (1, None),
}
TWINS: dict[str, dict[str, Any]] = {
    "HybriMoE": {},
    "module by module": {"cpu_graphs": "off"},
    "plain linears": {"linears": "plain", "dtype": "bfloat16"},
    "plain operators": {"dense": "plain", "dtype": "bfloat16"},
    "kt-kernel workers, plain operators": {
        "dense": "plain",
        "dtype": "bfloat16",
        "cpu_backend": "kt",
    },
}

Measure = Callable[[Sequence[int], Sequence[int]], tuple[float, list[float]]]
"""(prompt, ids fed one by one) -> (seconds until the prompt's last logits, seconds of each step).
"""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives what the JSON line says."""
    args = _parser().parse_args(arguments)
    if args.device == "cuda":
        from eval import cuda

        answer: dict[str, Any] = cuda.run(args)
        return answer
    torch.set_num_threads(args.threads)
    gguf = _gguf(args)
    rows, note = measure(args, gguf)
    name = gguf.stem if args.gguf_path else args.model
    file = f"throughput_{name}"
    if args.prompt_tokens != PROMPT_TOKENS:
        file += f"_{args.prompt_tokens}-tokens"
    report.show(
        f"{name}: {args.prompt_tokens} prompt tokens, {args.steps} steps, {args.turns} turns "
        f"(measured)",
        rows,
    )
    report.save_csv(args.out / f"{file}.csv", rows)
    report.save_figure(args.out / f"{file}.png", lambda axes: _draw(axes, rows), height=3.2)
    result = summary(name, rows, args.threads, note)
    report.finish(result)
    return result


def _parser() -> ArgumentParser:
    parser = report.parser(__doc__ or "")
    parser.add_argument(
        "--model", choices=MODELS, default="demo", help="demo, or a synthetic file of that shape"
    )
    parser.add_argument("--gguf_path", type=Path, help="a model's own file instead")
    parser.add_argument("--model_path", type=Path, help="directory with its config, if it has one")
    parser.add_argument("--layers", type=int, help="layers of the synthetic file")
    parser.add_argument(
        "--experts", type=int, help="routed experts in each layer of the synthetic file"
    )
    parser.add_argument("--quantisation", choices=synthetic.QUANTISATIONS, default="Q4_K_M")
    parser.add_argument(
        "--trace", type=Path, help="take the routing from a recorded trace (without llama.cpp then)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="for every system alike"
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_fresh(parser)
    return parser


def measure(args: Namespace, gguf: Path) -> tuple[list[dict[str, Any]], str]:
    """(one row per system, a note on llama.cpp)."""
    args.steps = args.steps or (10 if args.quick else 24)
    args.turns = args.turns or (2 if args.quick else 4)
    config = _config(args, gguf)
    needed, gbps = roofline.token_bytes(gguf, config), roofline.read_gbps(args.threads)
    bound_ms = needed / gbps / 1e6
    print(
        f"roofline: {needed / 1e6:.0f} MB per token at {gbps:.1f} GB/s with {args.threads} "
        f"threads: {bound_ms:.1f} ms"
    )
    print(
        "(main memory's bandwidth; a model that the last-level cache holds may pass it)", flush=True
    )
    beside, note = _beside(args, gguf)
    prompt, steps = _ids(args, config.vocab_size)
    times: dict[str, list[tuple[float, list[float]]]] = {}
    twins = TWINS if args.twins else {"HybriMoE": {}}
    for index, (name, settings) in enumerate(twins.items()):
        try:
            run, close = _ours(args, gguf, settings)
        except BackendError as error:
            if index == 0:
                raise
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        run(prompt, steps[:3])
        for _ in range(args.turns):
            times.setdefault(name, []).append(run(prompt, steps))
            if beside is not None and index == 0:  # it takes turns with ours; the twins come after
                answer = beside.ask(prompt=prompt, steps=steps)
                times.setdefault("llama.cpp", []).append((answer["prefill_s"], answer["step_s"]))
        close()
    if beside is not None:
        beside.close()
    return [_row(name, turns, len(prompt), bound_ms) for name, turns in times.items()], note


def _beside(args: Namespace, gguf: Path) -> tuple[peer.Peer | None, str]:
    if args.trace is not None:
        return None, "llama.cpp cannot take its routing from a trace"
    if peer.missing(args.peer_python):
        print(peer.HOW_TO_GET, file=sys.stderr, flush=True)
        return None, peer.HOW_TO_GET
    try:
        context = max(CONTEXT, args.prompt_tokens + args.steps)
        beside, note = peer.start(args.peer_python, gguf, args.threads, context)
    except RuntimeError as error:
        print(f"llama.cpp cannot run this file: {error}", file=sys.stderr, flush=True)
        return None, str(error)
    return beside, f"llama-cpp-python {beside.version}, {note}"


def _ours(
    args: Namespace, gguf: Path, settings: dict[str, Any]
) -> tuple[Measure, Callable[[], None]]:
    """(measure, give back) of an injected model."""
    from hybrimoe_plugin import load_model

    torch.set_num_threads(args.threads)
    model, _ = load_model(args.model_path, gguf, progress=False, accelerator="none", **settings)
    if args.trace is not None:
        from eval.forced import route_by

        route_by(model, args.trace)
    keyword = cache_name(model)

    @torch.inference_mode()
    def run(prompt: Sequence[int], steps: Sequence[int]) -> tuple[float, list[float]]:
        started = time.perf_counter()
        out = model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - started
        spent = []
        for token in steps:
            started = time.perf_counter()
            kept = {keyword: cache_in(out)}
            out = model(torch.tensor([[token]]), **kept, use_cache=True, logits_to_keep=1)
            spent.append(time.perf_counter() - started)
        return prefill, spent

    def close() -> None:
        nonlocal model
        model.hybrimoe.close()
        model = None
        gc.collect()

    return run, close


def _row(
    name: str, turns: Sequence[tuple[float, list[float]]], prompt: int, bound_ms: float
) -> dict[str, Any]:
    steps = [1e3 * step for _, spent in turns for step in spent]
    low, middle, high = (float(value) for value in np.percentile(steps, (20, 50, 80)))
    ttft = statistics.median(prefill for prefill, _ in turns)
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


def summary(name: str, rows: Sequence[dict[str, Any]], threads: int, note: str) -> dict[str, Any]:
    """What the JSON line says; ratios against llama.cpp are null where it did not run."""
    by_name = {row["system"]: row for row in rows}
    ours, theirs = by_name["HybriMoE"], by_name.get("llama.cpp")
    plain = by_name.get("plain operators")

    def ratio(other: dict[str, Any] | None, key: str) -> float | None:
        return None if other is None else ours[key] / other[key]

    return {
        "model": name,
        "threads": threads,
        "decode_vs_llama_cpp": ratio(theirs, "decode_tok_s"),
        "prefill_vs_llama_cpp": ratio(theirs, "prefill_tok_s"),
        "decode_tok_s": ours["decode_tok_s"],
        "prefill_tok_s": ours["prefill_tok_s"],
        "ttft_ms": ours["ttft_ms"],
        "tbt_ms_p50": ours["tbt_ms_p50"],
        "roofline_share": ours["roofline_share"],
        "decode_vs_plain_operators": ratio(plain, "decode_tok_s"),
        "llama_cpp": note,
    }


def _gguf(args: Namespace) -> Path:
    if args.gguf_path is not None:
        found: Path = args.gguf_path
        return found
    if args.model == "demo":
        from hybrimoe_plugin.demo.build import build_demo_model

        return build_demo_model("mixtral")
    layers, experts = SLICES[args.model]
    whole = (
        args.layers is not None and args.experts is None
    )  # other layers asked for: with all their experts
    return synthetic.build(
        args.model,
        args.layers or layers,
        args.quantisation,
        args.experts or (None if whole else experts),
    )


def _config(args: Namespace, gguf: Path) -> Any:
    from hybrimoe_plugin.hosts.transformers.config import model_config
    from hybrimoe_plugin.weights.gguf_store import GGUFStore

    return model_config(args.model_path, GGUFStore.open(gguf))


def _ids(args: Namespace, vocabulary: int) -> tuple[list[int], list[int]]:
    """Random tokens, the same for all systems: what they say does not matter, but the routing
    should vary.
    """
    drawn = (
        np.random.default_rng(0).integers(3, vocabulary, args.prompt_tokens + args.steps).tolist()
    )
    return drawn[: args.prompt_tokens], drawn[args.prompt_tokens :]


def _draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    names = [row["system"] for row in rows]
    places = range(len(rows))
    axes.barh(places, [row["decode_tok_s"] for row in rows], color="tab:blue")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("decode, tokens per second (measured)")


if __name__ == "__main__":
    main()
