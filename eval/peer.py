"""llama.cpp in a process of its own, asked over a pipe: `python eval/peer.py MODEL THREADS
[--no-amx]`.

It needs nothing but the package llama-cpp-python, so any interpreter that has it will do, and where
it ends with a signal only this process is lost. Each line on standard input is a JSON request, each
on standard output the answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOW_TO_GET = (
    "llama-cpp-python is not installed: `make peers` builds it (up to 20 minutes on 2 cores)"
)
_ARCH_PRCTL, _REQUEST_PERMISSION = 158, 0x1023


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
        command = [python, str(Path(__file__).resolve()), str(gguf), str(threads), str(context)]
        self._process = subprocess.Popen(
            command if amx else [*command, "--no-amx"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version = str(self._answer()["version"])

    def ask(self, **request: Any) -> dict[str, Any]:
        """{"prefill_s": ..., "step_s": [...]} for `prompt` (ids) and `steps` (ids fed one
        by one).
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is in the exit status
        return self._answer()

    def close(self) -> None:
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


def missing(python: str) -> bool:
    """Whether the interpreter lacks llama-cpp-python."""
    check = [python, "-c", "import llama_cpp"]
    return subprocess.run(check, capture_output=True, check=False).returncode != 0


def _serve(gguf: str, threads: int, context: int) -> None:
    # llama.cpp writes to standard output too: the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import llama_cpp

    model = llama_cpp.Llama(
        gguf,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=512,
        n_ubatch=512,
        verbose=False,
    )
    print(json.dumps({"version": llama_cpp.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        model.reset()
        started = time.perf_counter()
        model.eval(request["prompt"])
        prefill = time.perf_counter() - started
        steps = []
        for token in request["steps"]:
            started = time.perf_counter()
            model.eval([token])
            steps.append(time.perf_counter() - started)
        print(json.dumps({"prefill_s": prefill, "step_s": steps}), file=answers, flush=True)


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction))]


def _withhold_amx() -> None:
    """Let the kernel refuse the permission for AMX to this process (a seccomp filter on
    one call).
    """
    filters = (_Instruction * 6)(
        _Instruction(0x20, 0, 0, 0),  # load the call's number
        _Instruction(0x15, 0, 3, _ARCH_PRCTL),
        _Instruction(0x20, 0, 0, 16),  # load its first argument
        _Instruction(0x15, 0, 1, _REQUEST_PERMISSION),
        _Instruction(0x06, 0, 0, 0x00050000 | 1),  # fail with EPERM
        _Instruction(0x06, 0, 0, 0x7FFF0000),  # allow
    )
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(6, filters)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program)):
        sys.exit("cannot withhold AMX from this process")


if __name__ == "__main__":
    if "--no-amx" in sys.argv:
        _withhold_amx()
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
