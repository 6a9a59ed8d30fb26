"""SIGTERM and Ctrl-C in a real process: running answers are finished, new requests refused."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from asking import JSON, ask, raw
from serving import DONE, TEXT

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "tests" / "helpers" / "serving" / "serving.py"


class Process:
    """A server in a process of its own.

    Attributes:
        port: from the address that it printed.
    """

    def __init__(self, per_token: float, *flags: str) -> None:
        command = [sys.executable, str(PROGRAM), str(per_token), "serve", "--port", "0", *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("HYBRIMOE_API_KEY", None)
        self.running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.running.stdout is not None
        address = self.running.stdout.readline().strip()
        self.port = int(address.rpartition(":")[2])

    def signal(self, number: int) -> None:
        self.running.send_signal(number)

    def ended(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, err = self.running.communicate(timeout=60)
        return self.running.returncode, err


@contextmanager
def process(per_token: float, *flags: str) -> Iterator[Process]:
    found = Process(per_token, *flags)
    try:
        yield found
    finally:
        found.running.kill()
        found.running.communicate()


def begun(port: int) -> tuple[Any, Any]:
    """A connection with an answer of which the first part has arrived."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/stream", b"{}", JSON)
    answer = connection.getresponse()
    assert answer.readline() == b'data: "a"\n'
    return connection, answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_answer_is_finished_and_new_ones_are_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLD_UNTIL", str(tmp_path / "go"))
    with process(0.0) as server:
        connection, answer = begun(server.port)
        server.signal(number)
        health = ask(server.port, "/health")
        while health.status == 200:  # the signal is on its way
            health = ask(server.port, "/health")
        assert (health.status, health.json["status"]) == (503, "closing")
        refused = ask(server.port, "/v1/stream", body={})
        assert refused.status == 503 and refused.headers["connection"] == "close"
        (tmp_path / "go").touch()
        text = answer.read().decode()
        assert text.count("data: ") == len(TEXT) - 1 + 2
        assert text.endswith(f"data: stop\n\ndata: {DONE}\n\n")
        connection.close()
        code, err = server.ended()
        assert code == 0 and "Traceback" not in err
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))


def test_what_is_not_finished_in_time_is_cancelled_with_an_end() -> None:
    with process(0.5, "--shutdown_seconds", "0.2") as server:
        _, answer = begun(server.port)
        server.signal(signal.SIGTERM)
        assert answer.read().decode().endswith(f"data: cancelled\n\ndata: {DONE}\n\n")
        assert server.ended()[0] == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with process(1.0) as server:
        begun(server.port)
        server.signal(signal.SIGINT)
        while ask(server.port, "/health").status == 200:
            pass
        server.signal(signal.SIGINT)
        code, err = server.ended()
        assert code == 130 and err.endswith("hybrimoe: ended by a second signal\n")


def test_an_idle_server_ends_by_itself_and_said_what_it_serves() -> None:
    with process(0.0, "some.gguf", "--served_model_name", "name", "--api_key", "k") as server:
        idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        idle.request("GET", "/health")
        idle.getresponse().read()  # and the connection stays open
        server.signal(signal.SIGTERM)
        code, err = server.ended()
        assert code == 0
        assert f"serving name: OpenAI's API below http://127.0.0.1:{server.port}/v1" in err
        assert "curl" in err and "$HYBRIMOE_API_KEY" in err and "warning" not in err
        assert "GET /health 200" in err


def test_quiet_prints_the_address_alone() -> None:
    with process(0.0, "--quiet") as server:
        ask(server.port, "/health")
        assert raw(server.port, b"no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400")
        server.signal(signal.SIGTERM)
        assert server.ended() == (0, "")
