"""From answers to rows of a table."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval.reporting.quantiles import percentiles
from eval.reporting.rows import column, where
from eval.serving.client import Answer, Round

OURS, LLAMA = "HybriMoE", "llama.cpp"

Row = dict[str, Any]


class Cell(NamedTuple):
    """One server with one number of clients."""

    system: str
    clients: int


class Talk(NamedTuple):
    """Two turns of one conversation."""

    first: Answer
    second: Answer

    @property
    def share(self) -> float:
        """Of the first turn's time to first token, what the second one's takes."""
        return self.second.first_token_s / self.first.first_token_s


def cell_rows(rounds: Mapping[Cell, Sequence[Round]], args: Namespace) -> list[Row]:
    """A row for each cell, in the order of the cells."""
    return [
        {
            "server": cell.system,
            "clients": cell.clients,
            **_speeds(done),
            "turns": args.turns,
            "requests": args.requests,
            "prompt_tokens": args.prompt_tokens,
            "answer_tokens": args.answer_tokens,
        }
        for cell, done in rounds.items()
    ]


def _speeds(done: Sequence[Round]) -> Row:
    low, middle, high = percentiles([each.tokens_per_s for each in done])
    answers = [answer for each in done for answer in each.answers]
    first = _median_and_tail([answer.first_token_s for answer in answers])
    token = _median_and_tail([answer.token_s for answer in answers])
    gap = _median_and_tail([gap for answer in answers for gap in _gaps(answer)])
    return {
        "tok_s_p20": low,
        "tok_s_p50": middle,
        "tok_s_p80": high,
        "ttft_ms_p50": first[0],
        "ttft_ms_p95": first[1],
        "tpot_ms_p50": token[0],
        "tpot_ms_p95": token[1],
        "gap_ms_p50": gap[0],
        "gap_ms_p95": gap[1],
    }


def _gaps(answer: Answer) -> list[float]:
    """Seconds between pieces of text; the whole time for an answer that came in one piece."""
    times = answer.pieces_s
    if len(times) == 1:
        return [answer.ended_s - times[0]]
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def _median_and_tail(seconds: Sequence[float]) -> tuple[float, float]:
    """50th and 95th percentile in ms."""
    middle, tail = np.percentile(seconds, (50, 95))
    return 1e3 * float(middle), 1e3 * float(tail)


def talk_rows(talks: Mapping[str, Sequence[Talk]]) -> list[Row]:
    """A row for each server."""
    rows = []
    for name, held in talks.items():
        low, middle, high = percentiles([talk.share for talk in held])
        firsts = [1e3 * talk.first.first_token_s for talk in held]
        seconds = [1e3 * talk.second.first_token_s for talk in held]
        rows.append(
            {
                "server": name,
                "first_ttft_ms": percentiles(firsts)[1],
                "second_ttft_ms": percentiles(seconds)[1],
                "share_p20": low,
                "share_p50": middle,
                "share_p80": high,
                "first_tokens": held[-1].first.prompt_tokens,
                "second_tokens": held[-1].second.prompt_tokens,
                "cached_tokens": held[-1].second.cached_tokens,
                "conversations": len(held),
            }
        )
    return rows


def summary(name: str, rows: Sequence[Row], talks: Sequence[Row]) -> Row:
    """What the JSON line says; what llama.cpp's server was not measured for is null."""
    mine, theirs = where(rows, server=OURS), where(rows, server=LLAMA)
    counts = column(mine, "clients")
    speeds = dict(zip(counts, column(mine, "tok_s_p50"), strict=True))
    others = dict(zip(counts, column(theirs, "tok_s_p50"), strict=True)) if theirs else {}
    shares = {row["server"]: row["share_p50"] for row in talks}
    return {
        "model": name,
        "tok_s": speeds,
        "times_one_client": _times_first(speeds),
        "slower_than_one_client": slower(mine),
        "ttft_ms_p50": dict(zip(counts, column(mine, "ttft_ms_p50"), strict=True)),
        "vs_llama_cpp": {count: speeds[count] / others[count] for count in others} or None,
        "llama_cpp_tok_s": others or None,
        "llama_cpp_times_one_client": _times_first(others) or None,
        "second_turn_share": shares[OURS],
        "llama_cpp_second_turn_share": shares.get(LLAMA),
    }


def _times_first(speeds: Mapping[int, float]) -> dict[int, float]:
    """Each speed over that of the fewest clients."""
    return {count: speed / speeds[min(speeds)] for count, speed in speeds.items()}


def slower(rows: Sequence[Row]) -> list[int]:
    """The numbers of clients that give fewer tokens per second than the first, beyond the spread.

    Args:
        rows: of one server, by rising number of clients.
    """
    surely = rows[0]["tok_s_p20"]
    return [row["clients"] for row in rows[1:] if row["tok_s_p80"] < surely]
