"""How many clients can a server answer at once, and how fast, beside llama.cpp's server?

Both servers run the same file with as many threads and are alive for the whole run. Clients are
coroutines of this one process. They ask for completions of prompts of random tokens, of which no
two are alike, greedily and past any end of the text, so that every answer has the same length. A
client asks for the next one as soon as it has its answer. Each number of clients has the same
number of requests.

    tok_s      tokens of all answers over the time from the first request to the last answer's end,
               prompts included; percentiles over the turns
    ttft_ms    from a request to the first piece of its text; over all answers
    tpot_ms    of an answer: time from its first piece to its end, over its tokens but the first
    gap_ms     between two pieces of an answer

A second table is of conversations: a long first message, and a second turn after its answer. It
says what share of the first turn's time to first token the second turn takes.

Servers and numbers of clients take turns in one run, so that a change in the machine's speed
affects all of them alike. Clients together are called slower than one only if their speeds lie
apart: their 80th percentile below its 20th. The JSON line says whether the machine was quiet: other
programs' processor time is looked at, and the spread between turns.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from eval.models import files
from eval.reporting import plots, report
from eval.reporting.rows import column, where
from eval.serving import processes
from eval.serving.cells import LLAMA, OURS, Cell, Talk, cell_rows, summary, talk_rows
from eval.serving.client import Round, Server
from eval.serving.others import others_seconds
from eval.serving.prompts import Prompts
from hybrimoe_plugin.device.noise import Noise

SLICES: files.Slices = {
    "deepseek-v2-lite": (27, 16),
    "qwen2-57b-a14b": (2, None),
    "qwen3-30b-a3b": (4, None),
    "mixtral-8x7b": (1, None),
}
CLIENTS, QUICK_CLIENTS = (1, 2, 4, 8), (1, 4)
CONTEXT = 4096
"""Tokens that llama.cpp's server has room for in each answer, at least."""
WARM_UP_TOKENS = 8
TALK_TOKENS = 32
"""Most tokens of each turn's answer."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives the contents of the JSON line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    _fill_in(args)
    counts = (args.requests, args.prompt_tokens, args.answer_tokens, args.turns, args.threads)
    if min(*args.clients, *counts) < 1:
        parser.error("--clients and all counts are at least 1")
    name, gguf = files.chosen(args, SLICES)
    with _servers(args, gguf) as (servers, note):
        rows, talks, noise = measure(args, servers, _vocabulary(args, gguf))
    work = f"{args.requests} requests, {args.prompt_tokens} + {args.answer_tokens} tokens"
    place = args.out / f"serving_{name}"
    report.publish(f"{name}: {work}, {args.turns} turns (measured)", rows, place, draw)
    report.show(f"{name}: second turns of conversations (measured)", talks)
    report.save_csv(args.out / f"serving_{name}_second-turns.csv", talks)
    print(noise or "The machine was quiet.")
    result = summary(name, rows, talks) | {
        "threads": args.threads,
        "quiet": not noise,
        "llama_cpp": note,
    }
    report.finish(result)
    return result


def _parser() -> ArgumentParser:
    parser = report.parser(__doc__ or "", prog="python -m eval.serving")
    files.add_options(parser)
    parser.add_argument("--clients", type=int, nargs="+", help="numbers of clients to measure")
    parser.add_argument("--requests", type=int, help="of all clients together (default 8, quick 4)")
    parser.add_argument("--prompt_tokens", type=int, help="default 128, quick 64")
    parser.add_argument("--answer_tokens", type=int, help="default 128, quick 32")
    parser.add_argument("--talk_tokens", type=int, help="of a first message (2000, quick 500)")
    parser.add_argument("--turns", type=int, help="of each server (default 3, quick 1)")
    parser.add_argument("--url", help="measure a server that runs there in place of a new one")
    parser.add_argument("--llama_server", type=Path, help="llama.cpp's server, the program")
    return parser


def _fill_in(args: Namespace) -> None:
    """Sizes that were not given."""
    sizes = {
        "clients": (CLIENTS, QUICK_CLIENTS),
        "requests": (8, 4),
        "prompt_tokens": (128, 64),
        "answer_tokens": (128, 32),
        "talk_tokens": (2000, 500),
        "turns": (3, 1),
    }
    for name, (full, quick) in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    args.clients = sorted(set(args.clients))


@contextmanager
def _servers(args: Namespace, gguf: Path) -> Iterator[tuple[dict[str, Server], str]]:
    """(servers by name, a note on llama.cpp's); ended afterwards, unless they ran before."""
    started: list[processes.Process] = []
    servers: dict[str, Server] = {}
    slots = max(args.clients)
    try:
        if args.url is not None:
            servers[OURS] = Server(args.url)
        else:
            started.append(processes.ours(gguf, args.model_path, args.threads, slots))
            servers[OURS] = started[-1].server
        path = processes.find_llama(args.llama_server)
        if path is None:
            print(processes.HOW_TO_GET, file=sys.stderr, flush=True)
            yield servers, processes.HOW_TO_GET
            return
        context = max(CONTEXT, args.prompt_tokens + args.answer_tokens, 2 * args.talk_tokens)
        process, note = processes.llama(path, gguf, args.threads, slots, context)
        started.append(process)
        servers[LLAMA] = process.server
        yield servers, note
    finally:
        for process in started:
            process.close()


def measure(
    args: Namespace, servers: dict[str, Server], vocabulary: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """(rows of clients, rows of conversations, what disturbed them if anything did)."""
    prompts = Prompts(vocabulary)
    cells = [Cell(name, clients) for clients in args.clients for name in servers]
    print(f"{len(cells)} cells are warmed up, then measured in {args.turns} turns", flush=True)
    _warm_up(args, servers, prompts)
    rounds: dict[Cell, list[Round]] = {cell: [] for cell in cells}
    talks: dict[str, list[Talk]] = {name: [] for name in servers}
    noise = Noise(others_seconds)
    for turn in tqdm(range(args.turns), desc="turns", disable=None):
        for cell in cells if turn % 2 == 0 else cells[::-1]:
            asked = prompts.draw(args.requests, args.prompt_tokens)
            done = servers[cell.system].round(asked, cell.clients, args.answer_tokens)
            rounds[cell].append(done)
        for name, server in servers.items():
            first, second = prompts.words(args.talk_tokens), prompts.words(16)
            talks[name].append(Talk(*server.talk(first, second, TALK_TOKENS)))
    for held in rounds.values():
        noise.median([each.tokens_per_s for each in held])  # it remembers the spread
    return cell_rows(rounds, args), talk_rows(talks), noise.verdict()


def _warm_up(args: Namespace, servers: dict[str, Server], prompts: Prompts) -> None:
    """Have every number of rows computed once, which makes graphs and buffers."""
    for server in servers.values():
        for clients in args.clients:
            asked = prompts.draw(clients, args.prompt_tokens)
            server.round(asked, clients, WARM_UP_TOKENS)


def _vocabulary(args: Namespace, gguf: Path) -> int:
    from hybrimoe_plugin.hosts.transformers.config import model_config
    from hybrimoe_plugin.weights.gguf_store import GGUFStore

    return int(model_config(args.model_path, GGUFStore.open(gguf)).vocab_size)


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens per second over the number of clients, a line for each server."""
    ends = []
    for name, colour in ((LLAMA, plots.OTHER), (OURS, plots.OURS)):
        mine = where(rows, server=name)
        if not mine:
            continue
        counts, speeds = column(mine, "clients"), column(mine, "tok_s_p50")
        axes.plot(counts, speeds, color=colour, marker="o")
        ends.append(("ours" if name == OURS else name, speeds[-1], colour))
    axes.set_xscale("log", base=2)
    counts = sorted(set(column(rows, "clients")))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    plots.label_ends(axes, ends)
    axes.set_title("All clients' tokens together, on the CPU alone")
    axes.set_xlabel("clients at once")
    axes.set_ylabel("tokens per second (measured)")
