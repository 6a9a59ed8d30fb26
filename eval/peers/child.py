"""A program to compare with, in a process of its own, asked over a pipe.

    python eval/peers/child.py PACKAGE MODEL THREADS CONTEXT [FLAG ...]

PACKAGE is `llama_cpp` (llama-cpp-python) or `ik_llama_cpp` (ik-llama-cpp-python). Nothing else is
imported but the standard library and numpy, which both need, so any interpreter that has the
package can run this. Each line on standard input is a JSON request, each line on standard output
the answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

_ARCH_PRCTL, _REQUEST_PERMISSION = 158, 0x1023
_BATCH = 512
"""Most tokens of a prompt that are computed at once."""
NO_AMX, REPACK, NO_FLASH_ATTENTION = "--no-amx", "--repack", "--no-flash-attention"
"""REPACK and NO_FLASH_ATTENTION are for ik_llama.cpp: `Ik` says what they do."""


class LlamaCpp:
    """llama.cpp, through llama-cpp-python."""

    def __init__(self, gguf: str, threads: int, context: int, flags: Sequence[str]) -> None:
        import llama_cpp

        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._library = llama_cpp
        self._model = llama_cpp.Llama(
            gguf,
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=_BATCH,
            n_ubatch=_BATCH,
            verbose=False,
        )

    def reset(self) -> None:
        """Forget all tokens."""
        self._model.reset()

    def evaluate(self, tokens: Sequence[int]) -> None:
        """Compute tokens behind those that were evaluated before, and the last one's logits."""
        self._model.eval(tokens)

    def likeliest(self) -> int:
        """The token with the largest logit after the last one evaluated."""
        logits = self._library.llama_get_logits_ith(self._model.ctx, -1)
        return _largest(logits, self._model.n_vocab())


class Ik:
    """ik_llama.cpp, through the C functions that ik-llama-cpp-python declares.

    That package's own class neither repacks matrices nor sets the batches' sizes. Everything else
    is left as ik_llama.cpp's defaults have it, fused MoE kernels among them.

    Args:
        flags: REPACK merges matrices that share an input while loading, and interleaves rows, for
            faster kernels. NO_FLASH_ATTENTION switches off what is on by default.
    """

    def __init__(self, gguf: str, threads: int, context: int, flags: Sequence[str]) -> None:
        import ik_llama_cpp
        from ik_llama_cpp import _ctypes_api, _internals

        self._c: Any = _ctypes_api
        self._batch_of: Any = _internals.make_batch_range
        self._c.llama_backend_init()
        to_load = self._c.llama_model_default_params()
        repacks = REPACK in flags
        to_load.repack_tensors = to_load.merge_qkv = to_load.merge_up_gate_exps = repacks
        self._model = self._c.llama_model_load_from_file(os.fsencode(gguf), to_load)
        if not self._model:
            sys.exit("ik_llama.cpp cannot load this file")
        settings = self._c.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = _BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn = NO_FLASH_ATTENTION not in flags
        self._context = self._c.llama_init_from_model(self._model, settings)
        if not self._context:
            sys.exit("ik_llama.cpp cannot make a context")
        self._vocabulary = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        self._evaluated = 0
        self.version = f"ik-llama-cpp-python {ik_llama_cpp.__version__} ({self._instructions()})"

    def reset(self) -> None:
        """Forget all tokens."""
        self._c.llama_kv_cache_clear(self._context)
        self._evaluated = 0

    def evaluate(self, tokens: Sequence[int]) -> None:
        """Compute tokens behind those that were evaluated before, and the last one's logits."""
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            is_last = start + _BATCH >= len(tokens)
            batch = self._batch_of(part, pos_start=self._evaluated, logits_last=is_last)
            status = self._c.llama_decode(self._context, batch)
            self._c.llama_batch_free(batch)
            if status:
                sys.exit(f"ik_llama.cpp stopped with status {status}")
            self._evaluated += len(part)
        self._c.llama_get_logits_ith(self._context, -1)  # returns when they are there

    def likeliest(self) -> int:
        """The token with the largest logit after the last one evaluated."""
        return _largest(self._c.llama_get_logits_ith(self._context, -1), self._vocabulary)

    def _instructions(self) -> str:
        """The most that its kernels were compiled for: its wheels take any processor with AVX2."""
        describe = self._c._lib.llama_print_system_info
        describe.restype = ctypes.c_char_p
        said = describe().decode()
        for name in ("AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2"):
            if f"{name} = 1" in said:
                return f"compiled for {name}"
        return "compiled for no vector instructions that are known here"


PROGRAMS: dict[str, type[LlamaCpp] | type[Ik]] = {"llama_cpp": LlamaCpp, "ik_llama_cpp": Ik}


def _largest(logits: Any, count: int) -> int:
    import numpy as np

    return int(np.ctypeslib.as_array(logits, (count,)).argmax())


def _serve(package: str, gguf: str, threads: int, context: int, flags: Sequence[str]) -> None:
    # Both write to standard output too: the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    program = PROGRAMS[package](gguf, threads, context, flags)
    print(json.dumps({"version": program.version}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        program.reset()
        seconds, likeliest = [], []
        for tokens in (request["prompt"], *([token] for token in request["steps"])):
            started = time.perf_counter()
            program.evaluate(tokens)
            seconds.append(time.perf_counter() - started)
            likeliest.append(program.likeliest())
        answer = {"prefill_s": seconds[0], "step_s": seconds[1:], "likeliest": likeliest}
        print(json.dumps(answer), file=answers, flush=True)


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
    if NO_AMX in sys.argv:
        withhold_amx()
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
