"""Programs to compare with, each in a process of its own, asked over a pipe.

Where one ends with a signal only that process is lost.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.peers.child import NO_AMX, NO_FLASH_ATTENTION, REPACK
from eval.peers.interpreters import can_import

_CHILD = Path(__file__).with_name("child.py").resolve()


class Way(NamedTuple):
    """One way to run a program."""

    flags: tuple[str, ...]
    """Of `child.py`."""
    note: str
    """What they mean."""


class Program(NamedTuple):
    """A program to compare with."""

    name: str
    """In tables."""
    package: str
    """What its interpreter must have."""
    how_to_get: str
    ways: tuple[Way, ...]
    """The first one with which it runs is taken."""


LLAMA_CPP = Program(
    "llama.cpp",
    "llama_cpp",
    "llama-cpp-python is not installed: `make peers` builds it (up to 20 minutes on 2 cores)",
    # llama.cpp 0.3.36 built for a processor with AMX may end with SIGILL on a virtual one.
    (Way((), "as built"), Way((NO_AMX,), "without AMX")),
)
IK_LLAMA_CPP = Program(
    "ik_llama.cpp",
    "ik_llama_cpp",
    "ik-llama-cpp-python is not installed: `make peers` builds it in .venv-ik (10 minutes)",
    # Repacking gains a fifth to a half (docs/LOG.md). Its flash attention is said to fail on
    # processors without AVX-VNNI.
    (
        Way((REPACK,), "matrices repacked at load"),
        Way((REPACK, NO_FLASH_ATTENTION), "matrices repacked at load, without flash attention"),
        Way((NO_FLASH_ATTENTION,), "without flash attention"),
    ),
)


class Peer:
    """A program on one GGUF file.

    Args:
        python: an interpreter that has its package.
        flags: of `child.py`.

    Raises:
        RuntimeError: it did not start, or died.
    """

    def __init__(
        self,
        program: Program,
        python: str,
        gguf: Path,
        threads: int,
        context: int,
        flags: Sequence[str] = (),
    ) -> None:
        self._name = program.name
        command = [python, str(_CHILD), program.package, str(gguf), str(threads), str(context)]
        self._process = subprocess.Popen(
            [*command, *flags],
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
            {"prefill_s": ..., "step_s": [...], "likeliest": [next token after the prompt, and after
            each step]}

        Raises:
            RuntimeError: it died.
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
            raise RuntimeError(f"{self._name} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def start(
    program: Program, python: str, gguf: Path, threads: int, context: int
) -> tuple[Peer, str]:
    """(a peer that has survived a trial, its version and a note on how it runs).

    Raises:
        RuntimeError: it runs in none of its ways.
    """
    reason = ""
    for flags, note in program.ways:
        try:
            peer = Peer(program, python, gguf, threads, context, flags)
            # More rows than any small-batch path takes, and twice: a fault is not always at the
            # first.
            for _ in range(2):
                peer.ask(prompt=[3] * 64, steps=[3, 3])
        except RuntimeError as error:
            reason = str(error)
            continue
        more = f", because it {reason.partition(' ')[2]} otherwise" if reason else ""
        return peer, f"{peer.version}, {note}{more}"
    raise RuntimeError(reason)


class Peers:
    """Several programs on the same file, asked in turn; each may be missing, or die.

    Attributes:
        notes: name of each program -> its version and how it runs, or why it does not.
    """

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self._running: dict[str, Peer] = {}

    def add(self, program: Program, python: str, gguf: Path, threads: int, context: int) -> None:
        """Start a program; where that fails its note, which is printed too, says why."""
        name = program.name
        if not can_import(python, program.package):
            self.remark(name, program.how_to_get)
            return
        try:
            self._running[name], self.notes[name] = start(program, python, gguf, threads, context)
        except RuntimeError as error:
            self.remark(name, f"cannot run this file: {error}")

    def ask(self, prompt: Sequence[int], steps: Sequence[int]) -> dict[str, dict[str, Any]]:
        """Answers by name, as `Peer.ask` gives them. One that dies is asked no more."""
        answers = {}
        for name, peer in list(self._running.items()):
            try:
                answers[name] = peer.ask(prompt=prompt, steps=steps)
            except RuntimeError as error:
                del self._running[name]
                self.remark(name, str(error))
        return answers

    def remark(self, name: str, text: str) -> None:
        """Add to a program's note, and print it to stderr."""
        print(f"{name}: {text}", file=sys.stderr, flush=True)
        self.notes[name] = "; ".join(filter(None, (self.notes.get(name), text)))

    def close(self) -> None:
        """End all."""
        for peer in self._running.values():
            peer.close()
        self._running.clear()
