"""What a watcher of the server's page costs decoding: tokens/s with and without one, alternating.

    python scripts/live_cost.py [--accelerator emulated] [--cache_ratio 0.25] [--seconds 60]

Decodes with the demo model, on one thread, while a server in the same process has no watcher, or
one in a process of its own. Other programs' noise can hide one per cent of tokens/s. So it prints
the process's time on processors for each token too, and that of the samples alone.
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
from typing import Any, NamedTuple

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


class Speed(NamedTuple):
    """Of one piece."""

    tokens_s: float
    cpu_ms: float
    """Time on processors for each token, of all threads of this process."""


def decode(model: Any, tokens: int) -> Speed:
    prompt = torch.arange(3, 11).reshape(1, -1)
    began, cpu_began = time.perf_counter(), time.process_time()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    cpu_s = time.process_time() - cpu_began
    return Speed(tokens / (time.perf_counter() - began), 1e3 * cpu_s / tokens)


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
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"cpu_threads": 1}
    if asked.accelerator != "none":
        settings["cache_ratio"] = asked.cache_ratio
    model, _ = load_model(
        None, build_demo_model(), accelerator=asked.accelerator, progress=False, **settings
    )
    speeds: dict[bool, list[Speed]] = {False: [], True: []}
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
                speeds[True].append(decode(model, asked.tokens))
                watcher.terminate()
    alone, watched = (
        Speed(*map(statistics.median, zip(*speeds[is_watched], strict=True)))
        for is_watched in (False, True)
    )
    per_sample_us = 1e6 * source.sample_s / source.samples
    engine = model.hybrimoe.engines[0]
    hooks_us = hook_us(engine) * len(engine.layers) * watched.tokens_s
    row = {
        "accelerator": asked.accelerator,
        "pieces": len(speeds[True]),
        "tokens_s": round(alone.tokens_s, 2),
        "tokens_s_watched": round(watched.tokens_s, 2),
        "ratio_of_tokens_s": round(watched.tokens_s / alone.tokens_s, 4),
        "cpu_ms_per_token": round(alone.cpu_ms, 2),
        "cpu_ms_per_token_watched": round(watched.cpu_ms, 2),
        "ratio_of_cpu_ms": round(watched.cpu_ms / alone.cpu_ms, 4),
        "sample_us": round(per_sample_us, 1),
        "share_of_samples": round(per_sample_us * 5 / 1e6, 5),
        "share_of_hooks": round(hooks_us / 1e6, 6),
    }
    model.hybrimoe.close()
    print(json.dumps(row))


if __name__ == "__main__":
    main()
