"""Two replicas on a Ray cluster of this machine: conversations, floods, departures and deaths.

Run by `make test-ray`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from hybrimoe_plugin.serve.http.layers import Access
from hybrimoe_plugin.serve.scaling import launch
from hybrimoe_plugin.serve.scaling.maker import Maker
from hybrimoe_plugin.serve.scaling.placement import Front, Scale

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


ROOT = Path(__file__).resolve().parents[3]
FAKES = ROOT / "tests" / "helpers" / "serving"
ANSWER = "x" * 20
REQUESTS = 4
"""Of one replica at once."""
QUEUE = 4
PORT = free_port()
CHAT = "/v1/chat/completions"
ID = {"x-request-id": "mine"}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, FAKES))))  # of the replicas
        patch.setenv("RAY_ADDRESS", launch.LOCAL)
        maker = Maker("scripted_app:make_app", (ANSWER,))
        front = Front(Access("127.0.0.1", ["key"]), body_bytes=10_000)
        scale = Scale(replicas=2, requests=REQUESTS, queue=QUEUE)
        with launch.Cluster():
            from ray import serve

            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            serve.run(launch.application(maker, front, scale), name=launch.NAME)
            until(both_run)  # so far as the ingress knows
            yield
            serve.delete(launch.NAME)


@contextmanager
def asked(path: str, fields: Any = None, session: str = "") -> Iterator[HTTPResponse]:
    """The answer to a request; without fields it is a GET."""
    headers = {"authorization": "Bearer key", "x-session-id": session, **ID}
    connection = HTTPConnection("127.0.0.1", PORT, timeout=60)
    try:
        if fields is None:
            connection.request("GET", path, headers=headers)
        else:
            headers["content-type"] = "application/json"
            connection.request("POST", path, json.dumps(fields), headers)
        yield connection.getresponse()
    finally:
        connection.close()


def ask(path: str, fields: Any = None, session: str = "") -> tuple[int, str, str]:
    """Status, replica and text of an answer."""
    with asked(path, fields, session) as answer:
        return answer.status, answer.headers.get("x-replica", ""), answer.read().decode()


def turn(first: str, turns: int = 1, stream: bool = False, hold: Any = None) -> dict[str, Any]:
    """A request; with `hold`, its answer goes on after the first token when this file is there."""
    texts = [first, *map(str, range(turns - 1))]
    messages = [{"role": "user", "content": text} for text in texts]
    return {"messages": messages, "stream": stream, "hold": str(hold or "")}


def metric(name: str) -> dict[str, float]:
    """Replica -> value."""
    lines = [line for line in ask("/metrics")[2].splitlines() if line.startswith(name + "{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def until(is_true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def both_run() -> bool:
    return len(metric("healthy")) == 2


def test_a_conversation_stays_on_its_replica_and_all_are_used() -> None:
    used = set()
    for first in "abcdef":
        homes = {ask(CHAT, turn(first, turns))[1] for turns in (1, 2, 3)}
        assert len(homes) == 1
        used |= homes
    assert len(used) == 2


def test_requests_pass_the_same_layers_as_without_ray() -> None:
    with asked(CHAT, turn("a")) as answer:
        assert answer.headers.get_all("x-request-id") == [ID["x-request-id"]]
    assert ask(CHAT, turn("a" * 10_000))[0] == 413
    connection = HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 401
    connection.close()


def test_a_replica_knows_its_share_of_the_machine() -> None:
    threads = json.loads(ask("/health")[2])["threads"]
    assert threads == max(1, (os.cpu_count() or 1) // 2)


def running() -> float:
    return sum(metric("running").values())


def fill(pool: Executor, gate: Path, session: str) -> list[Future[tuple[int, str, str]]]:
    """Give both replicas as much as they take, one request after another."""
    waiting = []
    for number in range(1, 2 * REQUESTS + 1):
        waiting.append(pool.submit(ask, CHAT, turn("a", hold=gate), session))
        until(lambda running_now=number: running() == running_now)
    return waiting


def test_tokens_come_before_the_answer_is_complete(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with asked(CHAT, turn("a", stream=True, hold=gate)) as answer:
        first = answer.readline()
        gate.touch()
        rest = answer.read().decode()
    assert first.startswith(b"data: ")
    assert rest.count("data: ") == len(ANSWER)  # the last is [DONE]


def test_requests_of_a_busy_replica_go_to_the_other(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(2 * REQUESTS) as pool:
        waiting = fill(pool, gate, "a session")
        gate.touch()
        answers = [one.result() for one in waiting]
    assert {status for status, _, _ in answers} == {200}
    assert set(Counter(replica for _, replica, _ in answers).values()) == {REQUESTS}


def test_while_all_are_busy_a_flood_is_refused_and_health_is_told(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(2 * REQUESTS + 3 * QUEUE) as pool:
        started = fill(pool, gate, "")
        flood = [pool.submit(ask, CHAT, turn("a")) for _ in range(3 * QUEUE)]
        until(lambda: sum(one.done() for one in flood) == 2 * QUEUE)
        assert {one.result()[0] for one in flood if one.done()} == {429}
        assert ask("/health")[0] == 200
        gate.touch()
        assert {one.result()[0] for one in started} == {200}
        assert Counter(one.result()[0] for one in flood) == {200: QUEUE, 429: 2 * QUEUE}


def test_a_client_that_leaves_ends_its_answer(tmp_path: Path) -> None:
    before = sum(metric("cancelled").values())
    with asked(CHAT, turn("a", stream=True, hold=tmp_path / "never")) as answer:
        answer.readline()
    until(lambda: sum(metric("cancelled").values()) == before + 1)


def test_a_death_under_load_loses_no_request_in_silence(tmp_path: Path) -> None:
    until(both_run)
    gate = tmp_path / "gate"
    _, doomed, pid = ask("/pid", {}, "session 0")

    def one(number: int, stream: bool) -> tuple[int, str, str]:
        return ask(CHAT, turn("a", stream=stream, hold=gate), f"session {number}")

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(one, number, True) for number in range(2)]
        until(lambda: running() == 2)
        wholes = [pool.submit(one, number, False) for number in range(2)]
        until(lambda: running() == 4)
        os.kill(int(pid), signal.SIGKILL)
        gate.touch()
        told = [stream.result() for stream in streams]
        answers = [whole.result() for whole in wholes]
    assert {(status, json.loads(text)["pieces"]) for status, _, text in answers} == {
        (200, len(ANSWER) + 1)
    }
    assert doomed in {replica for _, replica, _ in told}
    for _, replica, text in told:
        last = text.strip().splitlines()[-1]
        if replica == doomed:
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == 502
        else:
            assert last == "data: [DONE]"
    until(lambda: both_run() and doomed not in metric("healthy"))


def test_a_request_that_kills_its_replicas_is_told_and_they_come_back() -> None:
    until(both_run)
    status, _, text = ask("/die", {})
    assert status == 502
    assert "died" in json.loads(text)["error"]["message"]
    until(both_run)
    assert ask(CHAT, turn("a"))[0] == 200


def test_a_replica_that_is_ill_is_replaced() -> None:
    until(both_run)
    ill = ask("/ill", {})[1]
    until(lambda: both_run() and ill not in metric("healthy"), 90)
