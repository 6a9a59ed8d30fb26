"""llama.cpp in a process of its own, asked over a pipe.

Where llama.cpp ends with a signal only that process is lost.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

HOW_TO_GET = (
    "llama-cpp-python is not installed: `make peers` builds it (up to 20 minutes on 2 cores)"
)
PACKAGE = "llama_cpp"


class Peer:
    """llama.cpp on one GGUF file.

    Args:
        python: an interpreter that has llama-cpp-python.
        amx: False withholds the permission to use AMX from the process.

    Raises:
        RuntimeError: it did not start, or died.
    """

    def __init__(
        self, python: str, gguf: Path, threads: int, context: int, amx: bool = True
    ) -> None:
        child = Path(__file__).with_name("llama_cpp_child.py").resolve()
        command = [python, str(child), str(gguf), str(threads), str(context)]
        self._process = subprocess.Popen(
            command if amx else [*command, "--no-amx"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version = str(self._answer()["version"])

    def ask(self, **request: Any) -> dict[str, Any]:
        """Times of a prompt and of single tokens after it.

        Args:
            request: `prompt` (ids) and `steps` (ids fed one by one).

        Returns:
            {"prefill_s": ..., "step_s": [...]}
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is in the exit status
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def start(python: str, gguf: Path, threads: int, context: int) -> tuple[Peer, str]:
    """(llama.cpp that has survived a trial, a note on how it runs).

    llama.cpp 0.3.36 built for a processor with AMX may end with SIGILL on a virtual one; it is then
    run without AMX.

    Raises:
        RuntimeError: it does not run either way.
    """
    reason = ""
    for amx in (True, False):
        try:
            peer = Peer(python, gguf, threads, context, amx)
            # More rows than any small-batch path takes, and twice: the fault is not always at the
            # first.
            for _ in range(2):
                peer.ask(prompt=[3] * 64, steps=[3, 3])
        except RuntimeError as error:
            reason = str(error)
            continue
        return peer, "as built" if amx else f"without AMX, with which {reason}"
    raise RuntimeError(reason)
