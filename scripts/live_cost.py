"""What a watcher of the server's page costs decoding: tokens/s with and without one, alternating.

    python scripts/live_cost.py [--accelerator emulated] [--cache_ratio 0.25] [--seconds 60]

Decodes with the demo model while a server in the same process has no watcher, or one in a process
of its own. Beside the medians it prints what watching takes by the count of processor time: noise
of other programs hides one per cent of tokens/s, but not that.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn

from hybrimoe_plugin.demo.build import build_demo_model
from hybrimoe_plugin.hosts.transformers import load_model
from hybrimoe_plugin.serve.api.app import build_app
from hybrimoe_plugin.serve.live import routes
from hybrimoe_plugin.serve.live.sources import EngineSource
from hybrimoe_plugin.serve.requests import Load
from hybrimoe_plugin.serve.service import Service

WATCHER = """
import sys, urllib.request
with urllib.request.urlopen(sys.argv[1]) as events:
    for _ in events: pass
"""


class Idle:
    """A scheduler that has nothing to do: this program calls the model itself."""

    def load(self) -> Load:
        return Load(1, 0, 0, 0, 0, 0)


class Timed(EngineSource):
    """Counts samples and their processor time."""

    samples = 0
    sample_s = 0.0

    def sample(self) -> Any:
        began = time.thread_time()
        found = super().sample()
        self.sample_s += time.thread_time() - began
        self.samples += 1
        return found


@contextmanager
def served(model: Any) -> Iterator[tuple[str, Timed]]:
    """The feed alone, in a thread."""
    scheduler: Any = Idle()
    service = Service(model, None, "demo", scheduler)
    source = Timed(model.hybrimoe.engines)
    original, routes.source_of = routes.source_of, lambda *_: source
    app = build_app(service, [routes.router(service)])
    routes.source_of = original
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}/v1/live", source
        finally:
            service.closing = server.should_exit = True
            thread.join()


def decode(model: Any, tokens: int) -> float:
    """Tokens per second."""
    prompt = torch.arange(3, 11).reshape(1, -1)
    began = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return tokens / (time.perf_counter() - began)


def hook_us(engine: Any) -> float:
    """What one call takes more with a watcher, in microseconds: the tuple and the append."""
    from collections import deque

    from hybrimoe_plugin.policy.step import whole_call

    call = whole_call(0, torch.zeros(1, 2, dtype=torch.int64).numpy(), 0.0, 1.0)
    log: deque[Any] = deque(maxlen=8192)
    began = time.perf_counter()
    for _ in range(100_000):
        log.append(type(call)(*call))
    return (time.perf_counter() - began) * 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accelerator", default="emulated")
    parser.add_argument("--cache_ratio", type=float, default=0.25)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=16, help="of each piece")
    asked = parser.parse_args()
    settings = {"cache_ratio": asked.cache_ratio} if asked.accelerator != "none" else {}
    model, _ = load_model(
        None, build_demo_model(), accelerator=asked.accelerator, progress=False, **settings
    )
    speeds: dict[bool, list[float]] = {False: [], True: []}
    watched_s = 0.0
    with served(model) as (url, source):
        decode(model, asked.tokens)
        end = time.monotonic() + asked.seconds
        while time.monotonic() < end or len(speeds[True]) < 3:
            speeds[False].append(decode(model, asked.tokens))
            program = [sys.executable, "-c", WATCHER, url]
            with subprocess.Popen(program) as watcher:
                samples = source.samples
                while source.samples == samples:
                    time.sleep(0.01)
                began = time.monotonic()
                speeds[True].append(decode(model, asked.tokens))
                watched_s += time.monotonic() - began
                watcher.terminate()
    alone, watched = (statistics.median(speeds[is_watched]) for is_watched in (False, True))
    per_sample_us = 1e6 * source.sample_s / source.samples
    engine = model.hybrimoe.engines[0]
    hooks_us = hook_us(engine) * len(engine.layers) * watched
    row = {
        "accelerator": asked.accelerator,
        "pieces": len(speeds[True]),
        "tokens_s": round(alone, 2),
        "tokens_s_watched": round(watched, 2),
        "ratio_of_medians": round(watched / alone, 4),
        "sample_us": round(per_sample_us, 1),
        "share_of_samples": round(per_sample_us * 5 / 1e6, 5),
        "share_of_hooks": round(hooks_us / 1e6, 6),
    }
    model.hybrimoe.close()
    print(json.dumps(row))


if __name__ == "__main__":
    main()
