"""llama.cpp's own logits, in a process of its own.

    python tests/oracle/llama_logits.py TOKENS FILE...

TOKENS are ids with commas between them. Each GGUF file gets FILE.npy beside it: logits [T, V]
float32 of one pass over all tokens, on one thread, with keys and values in float32.
"""

from __future__ import annotations

import sys
from typing import Any

import llama_cpp
import numpy as np


def main() -> None:
    tokens = [int(token) for token in sys.argv[1].split(",")]
    llama_cpp.llama_backend_init()
    for path in sys.argv[2:]:
        np.save(f"{path}.npy", _logits(path, tokens))


def _logits(path: str, tokens: list[int]) -> Any:
    model = llama_cpp.llama_model_load_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"{path}: llama.cpp does not load it")
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = 64
    wanted.type_k = wanted.type_v = llama_cpp.GGML_TYPE_F32
    wanted.n_threads = wanted.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, wanted)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place] = token
        batch.pos[place] = place
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = 0
        batch.logits[place] = 1
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit(f"{path}: llama.cpp does not compute it")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, place), (size,)).copy()
        for place in range(len(tokens))
    ]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.stack(rows)


if __name__ == "__main__":
    main()
