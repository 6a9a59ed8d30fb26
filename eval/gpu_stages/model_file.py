"""The check's model: Qwen3-30B-A3B in shape, twelve layers, a small vocabulary, random weights."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path

from eval import cuda_model, shapes, synthetic
from eval.cuda_bench import RECALL
from eval.gpu_stages.place import Place
from eval.shapes import MODELS, Routing, layer_bytes, routing
from hybrimoe_plugin.device.memory import free_host_bytes

MODEL = MODELS[0]
LAYERS = 12
DRY_LAYERS = 2
VOCABULARY = 8192
"""Head and embedding are read into memory at every load; they say nothing about experts."""
LOOK_AHEAD = 3
PROMPT_TOKENS = 128
DECODE_TOKENS = 48


@functools.cache  # predictions for every layer and token take seconds to make
def given(place: Place, prompt_tokens: int) -> Routing:
    """The recorded routing that stands in for the routers' choice."""
    tokens = (prompt_tokens // 16, 10) if place.dry else (prompt_tokens, DECODE_TOKENS)
    return routing(MODEL, *tokens, look_ahead=LOOK_AHEAD, recall=RECALL)


def model_file(place: Place) -> Path:
    """The model's file, written now if it is not there yet. A half-written one is never seen under
    this name.

    Raises:
        OSError: the scratch folder has no room.
    """
    shape = given(place, PROMPT_TOKENS)
    layers = DRY_LAYERS if place.dry else _layers(shape.header.experts)
    path = (
        place.scratch
        / f"qwen3-shape-{layers}-layers{'-tiny' if place.dry else ''}-{_writers_digest()}.gguf"
    )
    if path.exists():
        return path
    for left in place.scratch.glob("*.part"):
        left.unlink()  # of a run that was killed; no other check runs here
    handle, name = tempfile.mkstemp(dir=place.scratch, suffix=".part")
    os.close(handle)
    try:
        cuda_model.write(MODEL, shape, layers, Path(name), place.dry, vocabulary=VOCABULARY)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _writers_digest() -> str:
    """Eight hexadecimal digits that change with the code that decides what is in the file."""
    code = b"".join(
        Path(str(module.__file__)).read_bytes() for module in (cuda_model, shapes, synthetic)
    )
    return hashlib.sha256(code).hexdigest()[:8]


@functools.cache  # what is free changes while systems come and go, the model must not
def _layers(experts: int) -> int:
    """As many layers as leave half of the host's memory free: the file's pages want to
    stay in it.
    """
    return max(2, min(LAYERS, int(0.5 * free_host_bytes() / layer_bytes(MODEL, experts))))
