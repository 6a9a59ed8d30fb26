"""llama.cpp in a process of its own, asked over a pipe.

    python eval/peers/llama_cpp_child.py MODEL THREADS CONTEXT [--no-amx]

It imports nothing but the standard library and llama-cpp-python, so any interpreter that has that
package can run it. Each line on standard input is a JSON request, each line on standard output the
answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time

_ARCH_PRCTL, _REQUEST_PERMISSION = 158, 0x1023


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


def withhold_amx() -> None:
    """Let the kernel refuse this process the permission for AMX.

    A seccomp filter on one system call does it.
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
        withhold_amx()
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
