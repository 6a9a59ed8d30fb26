"""The check's model: Qwen3-30B-A3B in shape, twelve layers, a small vocabulary, random weights."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path

from eval.cuda_model import model_file as writer
from eval.gpu_bench.bench import RECALL
from eval.gpu_check.place import Place
from eval.models import routing, shapes, synthetic
from eval.models.routing import Routing
from eval.models.shapes import MODELS, layer_bytes
from hybrimoe_plugin.device.memory import free_host_bytes

MODEL = MODELS[0]
LAYERS = 12
DRY_LAYERS = 2
VOCABULARY = 8192
"""Head and embedding are read into memory at every load; they say nothing about experts."""
LOOK_AHEAD = 3
PROMPT_TOKENS = 128
DECODE_TOKENS = 48
DRY_DECODE_TOKENS = 10


@functools.cache  # predictions for every layer and token take seconds to make
def given(place: Place, prompt_tokens: int) -> Routing:
    """The recorded routing that replaces the routers' choice."""
    prompt, decode = prompt_tokens, DECODE_TOKENS
    if place.dry:
        prompt, decode = prompt_tokens // 16, DRY_DECODE_TOKENS
    return routing.routing(MODEL, prompt, decode, look_ahead=LOOK_AHEAD, recall=RECALL)


def model_file(place: Place) -> Path:
    """The model's file, written now if it is not there yet.

    A file that is being written has another name, so a partial one is never taken.

    Raises:
        OSError: the scratch folder has no room.
    """
    shape = given(place, PROMPT_TOKENS)
    layers = DRY_LAYERS if place.dry else _layers(shape.header.experts)
    size = "-tiny" if place.dry else ""
    path = place.scratch / f"qwen3-shape-{layers}-layers{size}-{_writers_digest()}.gguf"
    if path.exists():
        return path
    for left in place.scratch.glob("*.part"):
        left.unlink()  # of a run that was killed; no other check runs here
    handle, name = tempfile.mkstemp(dir=place.scratch, suffix=".part")
    os.close(handle)
    try:
        writer.write(MODEL, shape, layers, Path(name), place.dry, vocabulary=VOCABULARY)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _writers_digest() -> str:
    """Eight hexadecimal digits that change with the code that decides the file's contents."""
    modules = (writer, routing, shapes, synthetic)
    sources = [Path(str(module.__file__)).read_bytes() for module in modules]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:8]


@functools.cache  # free memory changes while systems come and go, the model must not
def _layers(experts: int) -> int:
    """As many layers as leave half of the memory free, so that the file's pages stay there."""
    room = 0.5 * free_host_bytes()
    count = int(room / layer_bytes(MODEL, experts))
    return max(2, min(LAYERS, count))
