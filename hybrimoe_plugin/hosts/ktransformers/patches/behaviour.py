"""What the host does that a user should not meet, whether or not it was compiled."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.hosts.ktransformers.changes import Changes
from hybrimoe_plugin.hosts.ktransformers.patches.base import Patch
from hybrimoe_plugin.hosts.ktransformers.patches.modules import _no_flash

_ATTENTION = (
    ("ktransformers.models.modeling_mixtral", "MixtralFlashAttention2"),
    ("ktransformers.models.modeling_qwen2_moe", "Qwen2MoeFlashAttention2"),
)


def _sees_itself(changes: Changes) -> None:
    """Count the current token into the cache's filled length.

    These classes give the token's position instead, which is one less.
    """
    for module, name in _ATTENTION:
        owner = getattr(importlib.import_module(module), name)
        changes.set(owner, "_flash_attention_forward", _one_more(owner._flash_attention_forward))


def _one_more(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def with_itself(*arguments: Any, **options: Any) -> torch.Tensor:
        bound = signature.bind(*arguments, **options)
        # Read for one query only; a longer call ignores it.
        if bound.arguments.get("position_ids") is not None:
            bound.arguments["position_ids"] = bound.arguments["position_ids"] + 1
        return forward(*bound.args, **bound.kwargs)

    return with_itself


class _SafeYAML:
    """`yaml` whose `load` builds plain values only, whichever loader is asked for."""

    def __getattr__(self, name: str) -> Any:
        import yaml

        return getattr(yaml, name)

    def load(self, stream: Any, Loader: Any = None) -> Any:  # noqa: N803
        import yaml

        return yaml.safe_load(stream)


def _safe_yaml(changes: Changes) -> None:
    changes.set(importlib.import_module("ktransformers.optimize.optimize"), "yaml", _SafeYAML())


_TYPES = (
    "Q4_1",
    "Q5_1",
    "IQ4_NL",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
)
"""GGML types that `gguf` dequantises and their loader does not know."""


def _more_types(changes: Changes) -> None:
    theirs: Any = importlib.import_module("ktransformers.util.custom_gguf")
    for name in _TYPES:
        kind = GGMLQuantizationType[name]
        if int(kind) in theirs.GGML_NAMES:
            continue
        elements, size = GGML_QUANT_SIZES[kind]
        changes.set_item(theirs.GGML_NAMES, int(kind), name)
        changes.set_item(theirs.GGML_BLOCK_SIZES, name, size)
        changes.set_item(theirs.GGML_ELEMENTS_PER_BLOCK, name, elements)
        on_cpu = functools.partial(_dequantize, kind)
        changes.set_item(theirs.GGML_DEQUANTIZE, name, on_cpu)
        changes.set_item(theirs.GGML_DEQUANTIZE_GPU, name, functools.partial(_dequantize_to, kind))


def _dequantize(kind: GGMLQuantizationType, data: Any) -> Any:
    """Float32 [n] from stored bytes."""
    return dequantize(np.frombuffer(data, dtype=np.uint8).reshape(1, -1), kind)[0]


def _dequantize_to(kind: GGMLQuantizationType, data: Any, device: str = "cuda") -> torch.Tensor:
    return torch.from_numpy(_dequantize(kind, data)).to(device)


def _tied_output(changes: Changes) -> None:
    """Where a file has no output matrix, the embedding is it."""
    loader: Any = importlib.import_module("ktransformers.util.custom_gguf").GGUFLoader
    construct: Callable[..., None] = loader.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        construct(self, *arguments, **options)
        for table in (self.tensor_info, self.tensor_file_map):
            if "token_embd.weight" in table:
                table.setdefault("output.weight", table["token_embd.weight"])

    changes.set(loader, "__init__", __init__)


def _cuda_graphs(changes: Changes) -> None:
    utils: Any = importlib.import_module("ktransformers.util.utils")
    generate: Callable[..., Any] = utils.prefill_and_generate
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def prefill_and_generate(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        if bound.arguments["use_cuda_graph"]:
            refuse_graphs(bound.arguments["model"])
        return generate(*arguments, **options)

    changes.set(utils, "prefill_and_generate", prefill_and_generate)


def refuse_graphs(model: Any) -> None:
    """Raises: BackendError: a CUDA graph cannot hold what this model does."""
    from hybrimoe_plugin.hosts.ktransformers.adapter import NO_GRAPHS
    from hybrimoe_plugin.operators.experts import HybriMoEExperts

    if any(isinstance(module, HybriMoEExperts) for module in model.modules()):
        raise BackendError(NO_GRAPHS)
    if not torch.cuda.is_available():
        raise BackendError(
            "CUDA graphs need a CUDA device, and there is none: start with --use_cuda_graph False"
        )


def _engine(changes: Changes) -> None:
    """Build the engine once the weights are loaded, so that errors come before the first prompt."""
    optimize: Any = importlib.import_module("ktransformers.optimize.optimize")
    load: Callable[..., None] = optimize.optimize_and_load_gguf

    @functools.wraps(load)
    def optimize_and_load_gguf(
        module: Any, rule_file: str, *arguments: Any, **options: Any
    ) -> None:
        from hybrimoe_plugin.hosts.ktransformers.adapter import attach
        from hybrimoe_plugin.injection.classes import import_classes
        from hybrimoe_plugin.injection.rules import load_rules

        # Names file and line of what theirs would trip over later.
        import_classes(load_rules(rule_file))
        load(module, rule_file, *arguments, **options)
        attach(module)

    changes.set(optimize, "optimize_and_load_gguf", optimize_and_load_gguf)


def _always(why: str) -> Callable[[], str | None]:
    return lambda: why


# Later releases keep their loader elsewhere and have compiled parts of other shapes; up to 0.5 only
# the patches apply whose functions are the same in their sources (read there, run with the pinned
# release only).
PATCHES = (
    Patch(
        "decode-sees-itself",
        "its Mixtral and Qwen2-MoE attention gives a token's position as the filled length of the "
        "cache, so that a decoded token does not see itself; the length is counted one more",
        "0.2.1",
        "0.2.2",
        _no_flash,
        _sees_itself,
    ),
    Patch(
        "safe-yaml",
        "it reads rules with a YAML loader that builds Python objects; rules need plain values "
        "only",
        "0.2.1",
        "0.5",
        _always("its optimize.py calls yaml.load"),
        _safe_yaml,
    ),
    Patch(
        "more-types",
        "its loader refuses GGUF files with Q4_1, Q5_1 or IQ tensors; the gguf package reads them",
        "0.2.1",
        "0.2.2",
        _always("its GGML_NAMES lacks them"),
        _more_types,
    ),
    Patch(
        "tied-output",
        "it refuses a GGUF without an output matrix, as models with tied embeddings have; the "
        "embedding is used",
        "0.2.1",
        "0.2.2",
        _always("its GGUFLoader knows no tied embeddings"),
        _tied_output,
    ),
    Patch(
        "cuda-graphs",
        "CUDA graphs are on by default and fail late, while decoding; a message that names the "
        "flag refuses them",
        "0.2.1",
        "0.5",
        _always("its local_chat turns CUDA graphs on"),
        _cuda_graphs,
    ),
    Patch(
        "engine",
        "without it the engine is built at the first prompt; it is built when the weights are "
        "loaded, and rules files are checked first",
        "0.2.1",
        "0.5",
        _always("it knows no step after loading"),
        _engine,
    ),
)
