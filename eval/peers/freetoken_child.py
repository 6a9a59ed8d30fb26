"""FreeToken in a process of its own: one JSON object in, one out.

    python eval/peers/freetoken_child.py REQUEST

It needs nothing but the package freetoken, so any interpreter that has it will do. Written against
the Python API of FreeToken 0.2.1 (`freetoken.llm.LLM`); its own server adds HTTP and a tokenizer to
this, and nothing to its speed.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from typing import Any

SPREAD = 1.0
"""Temperature. Greedy tokens of random weights may be one token for ever, whose experts would
always be cached.
"""


class NoTokenizer:
    """The file has no vocabulary to read, and prompts are given as ids."""

    eos_token_id = None

    def decode(self, ids: Any, **_options: Any) -> str:
        return ""


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Rates of each repetition.

    Args:
        request: `gguf`, `cache_bytes`, `prompts` (lengths), `generated`, `depth`, `repetitions`,
            `vocabulary`.

    Returns:
        {"version": ..., "decode": [tokens/s], "prompt of 128": [tokens/s], ...}

    Raises:
        RuntimeError: it gave fewer tokens than it was asked for.
    """
    model = _load(request)
    sampling: Any = importlib.import_module("freetoken.core").SamplingParams
    draw = random.Random(0)

    def ask(prompt: int, generated: int) -> tuple[float, list[float]]:
        """(start, when tokens arrived)."""
        model.arrived = []
        ids = [draw.randrange(3, request["vocabulary"]) for _ in range(prompt)]
        started = time.perf_counter()
        model.generate([ids], sampling(temperature=SPREAD, ignore_eos=True, max_tokens=generated))
        if len(model.arrived) != generated:
            raise RuntimeError(f"FreeToken gave {len(model.arrived)} of {generated} tokens")
        return started, list(model.arrived)

    rates: dict[str, list[float]] = {}
    for turn in range(request["repetitions"] + 1):
        found = {}
        for prompt in request["prompts"]:
            started, arrived = ask(prompt, 1)
            found[f"prompt of {prompt}"] = prompt / (arrived[0] - started)
        _, arrived = ask(request["depth"], request["generated"] + 1)
        found["decode"] = request["generated"] / (arrived[-1] - arrived[0])
        for what, rate in found.items() if turn else ():  # the first warms up
            rates.setdefault(what, []).append(rate)
    version = importlib.import_module("freetoken").__version__
    return {"version": version, **rates}


def _load(request: dict[str, Any]) -> Any:
    """FreeToken's engine on the file.

    Its `arrived` is a list of the times at which tokens were there.
    """
    scheduler: Any = importlib.import_module("freetoken.scheduler.scheduler")
    scheduler.load_tokenizer = lambda *_given: NoTokenizer()
    scheduler.load_eos_token_ids = lambda *_given: frozenset()
    base: Any = importlib.import_module("freetoken.llm").LLM

    class Timed(base):
        arrived: list[float]

        def offline_send_result(self, reply: Any) -> None:
            now = time.perf_counter()
            self.arrived.extend(now for message in reply if hasattr(message, "next_token"))
            super().offline_send_result(reply)

    longest = max(request["depth"], *request["prompts"]) + request["generated"] + 8
    return Timed(
        request["gguf"],
        moe_cache_mem=request["cache_bytes"],
        max_running_req=1,
        cuda_graph_max_bs=1,
        max_seq_len_override=longest,
        num_token_override=4096 + 2 * longest,
        cache_type="naive",  # no prompt may profit from another
    )


if __name__ == "__main__":
    # FreeToken logs to standard output too: the answer gets a descriptor of its own.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps(main(json.loads(sys.argv[1]))), file=answer, flush=True)
    os._exit(0)  # its workers need not be wound up
