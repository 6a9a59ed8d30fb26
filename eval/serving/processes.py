"""Servers as processes of their own: ours and llama.cpp's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx2

from eval.peers.llama_bench import last_line
from eval.reporting.report import ROOT
from eval.serving.client import AnswerError, Server
from hybrimoe_plugin.errors import HybriMoEError

BUILT = ROOT / "build" / "llama-server" / "bin" / "llama-server"
"""Where `make peers-server` puts llama.cpp's server."""
HOW_TO_GET = (
    "llama.cpp's server is not there: `make peers-server` builds it (up to 20 minutes on 2 cores), "
    "or name one by --llama_server"
)
START_S = 300.0
"""Longest time until a server answers: it may build the demo model first."""
STOP_S = 20.0


class ServerError(HybriMoEError):
    """A server did not start, or died."""


class Process:
    """A server on a free port of this machine.

    Args:
        command: what starts it, without its address.
        variables: of its environment, beside this process's own.

    Raises:
        ServerError: it ended, or gave no answer in time.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        port = _free_port()
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            cwd=ROOT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            self._wait(url)
            self.server = Server(url)
        except BaseException:
            self.close()
            raise

    def state(self) -> str:
        """Whether it still runs, or how it ended."""
        status = self._process.poll()
        return "it still runs" if status is None else f"it ended with status {status}"

    def said(self) -> str:
        """The last line that it wrote."""
        self._log.seek(0)
        return last_line(self._log.read())

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _wait(self, url: str) -> None:
        """Until it is healthy."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"{self.state()}: {self.said()}")
            try:
                if httpx2.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx2.HTTPError:
                pass  # it does not listen yet
            time.sleep(0.2)
        raise ServerError(f"no answer within {START_S:.0f} s; {self.state()}: {self.said()}")


def ours(gguf: Path, model_path: Path | None, threads: int, slots: int) -> Process:
    """Our server, on the CPU alone.

    Args:
        slots: most answers that it decodes together.

    Raises:
        ServerError: it did not start.
    """
    command = [sys.executable, "-m", "hybrimoe_plugin", "serve", "--gguf_path", str(gguf)]
    if model_path is not None:
        command += ["--model_path", str(model_path)]
    command += ["--device", "cpu", "--cpu_threads", str(threads), "--max_batch", str(slots)]
    return Process(command, {"OMP_NUM_THREADS": str(threads)})


def find_llama(named: Path | None) -> str | None:
    """Path of llama.cpp's server: the named one, the one that was built here, or an installed one.

    None where there is none.
    """
    if named is not None:
        return str(named) if named.is_file() else None
    return str(BUILT) if BUILT.is_file() else shutil.which("llama-server")


def llama(path: str, gguf: Path, threads: int, slots: int, context: int) -> tuple[Process, str]:
    """(llama.cpp's server that has survived a trial, a note on how it runs).

    A build for a processor with AMX may end with SIGILL on a virtual one; it is then run without
    AMX.

    Args:
        slots: most answers that it decodes together.
        context: tokens of each.

    Raises:
        ServerError: it does not run either way.
    """
    command = [path, "--model", str(gguf), "--threads", str(threads), "--parallel", str(slots)]
    command += ["--ctx-size", str(slots * context)]
    without_amx = [sys.executable, "-m", "eval.peers.without_amx", *command]
    variables = {"OMP_NUM_THREADS": str(threads)}
    reason = ""
    for tried in (command, without_amx):
        try:
            process = Process(tried, variables)
        except ServerError as error:
            reason = str(error)
            continue
        try:
            # More rows than any small-batch path takes, and twice: the fault is not always at the
            # first.
            process.server.round([[3] * 64, [4] * 64], 1, 2)
        except AnswerError:
            reason = process.state()
            process.close()
            continue
        return process, "as built" if tried is command else f"without AMX, with which {reason}"
    raise ServerError(f"{path}: {reason}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
