"""How many tokens per second does the CPU alone compute in calls of a few rows?

Two kinds of call are measured at each number of rows R, over a KV cache of the same context:

    conversations   [R, 1]: one new token of each of R conversations, as a server decodes them
    chain           [1, R]: R tokens of one conversation, as a draft's verification has them

Row counts and kinds take turns in one run, so that a change in the machine's speed affects all of
them alike; each number is a median over the turns. Every turn has other random tokens. Random rows
have few experts in common, fewest on a synthetic file, whose router is random: this is the hard
case. The share of the bandwidth counts what a call has to read: the dense matrices once, and once
each expert that any row has chosen.

A number of rows is called slower than a smaller one only if their times lie apart: its 20th
percentile gives fewer tokens per second than the other's 80th. The JSON line says whether the
machine was quiet.
"""

from __future__ import annotations

import gc
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from eval.models import files
from eval.peers import roofline
from eval.reporting import plots, report
from eval.reporting.quantiles import percentiles
from eval.reporting.rows import column, where
from hybrimoe_plugin.compute.attention.kept_entries import cut_entries
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name, use_growing_layer
from hybrimoe_plugin.device.noise import Noise
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.weights.gguf_store import GGUFStore

SLICES: files.Slices = {
    # A layer keeps all its experts, so that calls read what the model's do.
    "deepseek-v2-lite": (4, None),
    "qwen2-57b-a14b": (2, None),
    "qwen3-30b-a3b": (4, None),
    "mixtral-8x7b": (1, None),
}
ROWS = (1, 2, 4, 8, 16, 32)
CONTEXT = 96
"""Tokens in the KV cache of each conversation."""
CONVERSATIONS, CHAIN = KINDS = ("conversations", "chain")


class Cell(NamedTuple):
    """One number of rows in one kind of call."""

    kind: str
    rows: int


class Spent(NamedTuple):
    """Times of one call."""

    call_ms: float
    layers_ms: float
    """Until the head begins, which is a large part of a file with few layers."""


class Subject:
    """An injected model, and a KV cache for each kind of call.

    Args:
        rows: the largest number of them.
        context: tokens of each conversation.
    """

    def __init__(self, args: Namespace, gguf: Path, rows: int, context: int) -> None:
        from hybrimoe_plugin import load_model

        settings = {"graphs": args.graphs}
        self.model, _ = load_model(
            args.model_path, gguf, progress=False, accelerator="none", **settings
        )
        self._context = context
        self._keyword = cache_name(self.model)
        self._head_began = 0.0
        self._random = torch.Generator().manual_seed(0)
        self.model.get_output_embeddings().register_forward_pre_hook(self._note_head)
        filled = cache_in(self._forward(self.tokens(rows, context), DynamicCache()))
        self._held = [(layer.keys.clone(), layer.values.clone()) for layer in filled.layers]
        self._caches: dict[int, Any] = {}
        """By number of conversations."""

    def tokens(self, *shape: int) -> torch.Tensor:
        """Random ids. What they say does not matter, but the routing should vary."""
        return torch.randint(3, self.model.config.vocab_size, shape, generator=self._random)

    @torch.inference_mode()
    def call(self, cell: Cell) -> Spent:
        """Time one call, after which the cache holds what it held before."""
        conversations = cell.rows if cell.kind == CONVERSATIONS else 1
        ids = self.tokens(conversations, cell.rows // conversations)
        cache = self._cache(conversations)
        started = time.perf_counter()
        self._forward(ids, cache)
        ended = time.perf_counter()
        for layer in cache.layers:
            cut_entries(layer, self._context)
        return Spent(1e3 * (ended - started), 1e3 * (self._head_began - started))

    @contextmanager
    def counted_experts(self) -> Iterator[list[int]]:
        """Note how many distinct experts each layer's call takes."""
        counts: list[int] = []

        def note(_module: Any, inputs: tuple[Any, ...]) -> None:
            counts.append(len(inputs[1].unique()))

        modules = [part for part in self.model.modules() if isinstance(part, HybriMoEExperts)]
        hooks = [module.register_forward_pre_hook(note) for module in modules]
        try:
            yield counts
        finally:
            for hook in hooks:
                hook.remove()

    def close(self) -> None:
        self.model.hybrimoe.close()
        del self.model
        gc.collect()

    def _cache(self, conversations: int) -> Any:
        if conversations not in self._caches:
            made = DynamicCache()
            for number, (keys, values) in enumerate(self._held):
                use_growing_layer(made, number)  # as attention does in a cache that it fills
                made.update(keys[:conversations], values[:conversations], number)
            self._caches[conversations] = made
        return self._caches[conversations]

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, cache: Any) -> Any:
        return self.model(ids, **{self._keyword: cache}, use_cache=True)

    def _note_head(self, *_called: Any) -> None:
        self._head_began = time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives the contents of the JSON line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if min(*args.rows, args.context, args.threads, 1 if args.turns is None else args.turns) < 1:
        parser.error("--rows, --context, --threads and --turns are at least 1")
    torch.set_num_threads(args.threads)
    name, gguf = files.chosen(args, SLICES)
    rows, noise = measure(args, gguf)
    title = f"{name}: {args.turns} turns, {args.context} tokens of context (measured)"
    report.publish(title, rows, args.out / f"batches_{name}", draw)
    print(noise or "The machine was quiet.")
    result = summary(name, rows, args.threads) | {"quiet": not noise}
    report.finish(result)
    return result


def _parser() -> ArgumentParser:
    parser = report.parser(__doc__ or "")
    files.add_options(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="row counts to measure")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens in the cache")
    parser.add_argument("--turns", type=int, help="calls of each cell (default 15, quick 7)")
    parser.add_argument("--graphs", choices=("auto", "off"), default="auto", help="off: plain twin")
    return parser


def measure(args: Namespace, gguf: Path) -> tuple[list[dict[str, Any]], str]:
    """(one row for each kind of call and number of rows, what disturbed them if anything did).

    Sets `turns` where it is not given.
    """
    if args.turns is None:
        args.turns = 7 if args.quick else 15
    gbps = roofline.read_gbps(args.threads)
    print(f"main memory is read at {gbps:.1f} GB/s with {args.threads} threads", flush=True)
    cells = [Cell(kind, rows) for rows in sorted(set(args.rows)) for kind in KINDS]
    print(f"{len(cells)} kinds of call are warmed up, then timed in {args.turns} turns", flush=True)
    subject = Subject(args, gguf, max(args.rows), args.context)
    weights = Weights.of(gguf, subject.model.config)
    warmed = tqdm(cells, desc="warm-up", disable=None)
    experts = {cell: _experts(subject, cell) for cell in warmed}
    spent: dict[Cell, list[Spent]] = {cell: [] for cell in cells}
    noise = Noise()
    for _ in tqdm(range(args.turns), desc="turns", disable=None):
        for cell in cells:
            spent[cell].append(subject.call(cell))
    for calls in spent.values():
        noise.median([call.call_ms for call in calls])  # it remembers the spread
    verdict = noise.verdict()  # before `close` ends threads, whose waits count
    subject.close()
    return [_row(cell, spent[cell], experts[cell], weights, gbps) for cell in cells], verdict


def _experts(subject: Subject, cell: Cell, calls: int = 2) -> float:
    """Distinct experts that a call takes, over all layers; the calls warm up its graphs too."""
    with subject.counted_experts() as counts:
        for _ in range(calls):
            subject.call(cell)
    return sum(counts) / calls


class Weights(NamedTuple):
    """Stored bytes of a model."""

    dense_bytes: int
    """What every call reads: all matrices but those of routed experts, the head among them."""
    expert_bytes: float
    """One routed expert in one layer, on average."""
    layers: int
    """With routed experts."""

    @classmethod
    def of(cls, gguf: Path, config: Any) -> Weights:
        from hybrimoe_plugin.weights.layer_weights import expert_counts

        tensors = GGUFStore.open(gguf).tensors
        routed = {name: info.nbytes for name, info in tensors.items() if "_exps." in name}
        experts, _ = expert_counts(config)
        layers = len({name.split(".")[1] for name in routed})
        each = sum(routed.values()) / (layers * experts)
        chosen = config.num_experts_per_tok * layers * each
        return cls(round(roofline.token_bytes(gguf, config) - chosen), each, layers)


def _row(
    cell: Cell, spent: Sequence[Spent], experts: float, weights: Weights, gbps: float
) -> dict[str, Any]:
    low, middle, high = percentiles([call.call_ms for call in spent])
    layers_low, layers, layers_high = percentiles([call.layers_ms for call in spent])
    needed = weights.dense_bytes + experts * weights.expert_bytes
    return {
        "kind": cell.kind,
        "rows": cell.rows,
        "call_ms_p20": low,
        "call_ms_p50": middle,
        "call_ms_p80": high,
        "tok_s": 1e3 * cell.rows / middle,
        "bandwidth_share": needed / gbps / 1e6 / middle,
        "layers_ms_p20": layers_low,
        "layers_ms_p50": layers,
        "layers_ms_p80": layers_high,
        "layers_tok_s": 1e3 * cell.rows / layers,
        "experts_a_layer": experts / weights.layers,
        "read_mb": needed / 1e6,
    }


def summary(name: str, rows: Sequence[dict[str, Any]], threads: int) -> dict[str, Any]:
    """What the JSON line says."""
    found: dict[str, Any] = {"model": name, "threads": threads}
    for kind in KINDS:
        mine = where(rows, kind=kind)
        counts = column(mine, "rows")
        found[f"{kind}_tok_s"] = dict(zip(counts, column(mine, "tok_s"), strict=True))
        shares = column(mine, "bandwidth_share")
        found[f"{kind}_bandwidth_share"] = dict(zip(counts, shares, strict=True))
    for key, time_ms in (
        ("slower_with_more_rows", "call_ms"),
        ("layers_slower_with_more_rows", "layers_ms"),
    ):
        found[key] = [
            f"{kind} {count}" for kind in KINDS for count in slower(where(rows, kind=kind), time_ms)
        ]
    return found


def slower(rows: Sequence[dict[str, Any]], time_ms: str = "call_ms") -> list[int]:
    """The row counts that give fewer tokens per second than some smaller one, beyond the spread.

    Args:
        rows: of one kind of call, by rising number of rows.
        time_ms: columns whose 20th and 80th percentiles are compared.
    """
    surely = 0.0  # tokens per ms that some smaller count gives in four turns out of five
    found = []
    for row in rows:
        if row["rows"] / row[f"{time_ms}_p20"] < surely:
            found.append(row["rows"])
        surely = max(surely, row["rows"] / row[f"{time_ms}_p80"])
    return found


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens per second over the number of rows, a line for each kind of call."""
    ends = []
    for kind, colour in zip(KINDS, (plots.OURS, plots.OTHER), strict=True):
        mine = where(rows, kind=kind)
        counts, speeds = column(mine, "rows"), column(mine, "tok_s")
        axes.plot(counts, speeds, color=colour, marker="o")
        ends.append((kind, speeds[-1], colour))
    axes.set_xscale("log", base=2)
    counts = sorted(set(column(rows, "rows")))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    plots.label_ends(axes, ends)
    axes.set_title("Calls of a few rows on the CPU alone")
    axes.set_xlabel("rows a call")
    axes.set_ylabel("tokens per second (measured)")


if __name__ == "__main__":
    main()
