"""Does the injected model say what the plain model says?

Measured on text that ships with Python (`pydoc_data.topics`): the share of positions at which both
find the same next token likeliest, and the difference in perplexity. The plain model is
transformers' own, every weight dequantised, in float32; what differs is the rounding of activations
in the quantised kernels.

The last two rows have the arithmetic of a GPU's decode kernels: activations in floating point, and
rounded to int8 as they may do. On a GPU activations of prompts are not rounded to int8; here those
of every position are, so that each of them tells something.

Differences are shares: 0.01 is 1 %. In the last line, figures that begin with `int8_` compare the
last row with the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from eval.reporting import plots, report
from eval.reporting.rows import column
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name

CHUNK_TOKENS = 256
DECODED = 32
INJECTED, PLAIN_LINEARS, KT_KERNEL = (
    "injected",
    "injected, plain linears",
    "injected, kt-kernel workers",
)
VARIANTS: dict[str, dict[str, Any]] = {
    INJECTED: {},
    PLAIN_LINEARS: {"dense": "dequantised", "dtype": "float32"},
    KT_KERNEL: {"cpu_backend": "kt", "dtype": "float32"},
}
"""Injected models that are compared with the plain one, by settings."""
GPU_FLOAT, GPU_INT8 = "GPU arithmetic, float", "GPU arithmetic, int8"
ON_GPU: dict[str, Any] = {
    "accelerator": "emulated",
    "kernels": "torch",
    "cache_ratio": 1.0,
    "scheduler": "accelerator_only",
    "prefetch": "off",
    "profile": "a6000-deepseek-v2-lite",  # any will do: nothing is timed
    "dense": "dequantised",
    "dtype": "float32",
}
"""All experts on an emulated GPU, all else as in the plain model."""
IN_RESULT = ("token_agreement", "perplexity_difference", "logits_relative_rms")
"""Figures of the first variant in the JSON line; with `int8_` before them, of int8 activations
against floating point in the same arithmetic.
"""
TOPICS = ("for", "exceptions", "numbers", "strings", "class", "lambda", "naming", "assignment")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives the contents of the JSON line."""
    parser = report.parser(__doc__ or "", "python -m eval.fidelity")
    parser.add_argument("--gguf_path", type=Path, help="a model's file; default the demo model")
    parser.add_argument(
        "--model_path", type=Path, help="directory with its config and tokenizer, if it has one"
    )
    parser.add_argument(
        "--chunks", type=int, help=f"pieces of {CHUNK_TOKENS} tokens (default 12, quick 3)"
    )
    args = parser.parse_args(arguments)
    gguf = args.gguf_path or _demo()
    plain, tokenizer = _load(args.model_path, gguf, None)
    chunks = texts(tokenizer, args.chunks or (3 if args.quick else 12))
    wanted = [logits(plain, chunk) for chunk in chunks]
    del plain
    rows = []
    for name, settings in VARIANTS.items():
        if args.quick and name == KT_KERNEL:
            continue
        model, _ = _load(args.model_path, gguf, {"accelerator": "none", **settings})
        found = [logits(model, chunk) for chunk in chunks]
        rows.append({"model": name, **compare(chunks, wanted, found)})
        model.hybrimoe.close()
        del model
    plain_logits, int8_logits = on_gpu(args.model_path, gguf, chunks)
    for name, found in ((GPU_FLOAT, plain_logits), (GPU_INT8, int8_logits)):
        rows.append({"model": name, **compare(chunks, wanted, found)})
    text = f"{len(chunks)} x {CHUNK_TOKENS} tokens of pydoc's topics"
    title = f"Against the plain model in float32, {text}"
    report.publish(title, rows, args.out / "fidelity", draw, height=2.6)
    rounded = compare(chunks, plain_logits, int8_logits)
    result = {name: rows[0][name] for name in IN_RESULT}
    result |= {f"int8_{name}": rounded[name] for name in IN_RESULT}
    report.finish(result)
    return result


def texts(tokenizer: Any, count: int) -> list[torch.Tensor]:
    """`count` pieces [1, T] of Python's own documentation.

    Raises:
        ValueError: there is not so much text.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in TOPICS if name in topics)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    needed = count * CHUNK_TOKENS
    if len(ids) < needed:
        raise ValueError(f"the text has {len(ids)} tokens, {count} chunks need {needed}")
    return list(ids[None, :needed].split(CHUNK_TOKENS, dim=1))


def on_gpu(
    model_path: Path | None, gguf: Path, chunks: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each chunk's logits with activations in floating point and in int8, by GPU arithmetic."""
    model, _ = _load(model_path, gguf, ON_GPU)
    found = []
    engines = model.hybrimoe.engines
    try:
        for int8 in (False, True):
            for engine in engines:
                engine.accelerator.kernels.int8 = int8
            found.append([logits(model, chunk, decoded=0) for chunk in chunks])
        on_cpu = sum(engine.controller.counters.experts_cpu for engine in engines)
        assert not on_cpu, f"{on_cpu} experts were computed on the CPU, which rounds by itself"
    finally:
        model.hybrimoe.close()
    float_logits, int8_logits = found
    return float_logits, int8_logits


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor, decoded: int = DECODED) -> torch.Tensor:
    """[T, V] float32: one prefill, then the last `decoded` positions one by one, as in answers."""
    first = max(1, ids.shape[1] - decoded)
    keyword = cache_name(model)
    out = model(ids[:, :first], use_cache=True)
    parts = [out.logits[0]]
    for at in range(first, ids.shape[1]):
        kept = {keyword: cache_in(out)}
        out = model(ids[:, at : at + 1], **kept, use_cache=True)
        parts.append(out.logits[0])
    return torch.cat(parts).float()


def compare(
    chunks: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
) -> dict[str, float]:
    """Agreement of the likeliest tokens, perplexities and relative error of all chunks' logits.

    A position counts as agreeing only if the one likeliest token is the same; near ties are not
    forgiven.
    """
    targets = torch.cat([chunk[0, 1:] for chunk in chunks])
    plain = torch.cat([part[:-1] for part in wanted])
    ours = torch.cat([part[:-1] for part in found])
    same = plain.argmax(-1) == ours.argmax(-1)
    error = (ours - plain).norm() / plain.norm()
    perplexity_plain = _perplexity(plain, targets)
    perplexity = _perplexity(ours, targets)
    return {
        "token_agreement": float(same.float().mean()),
        "perplexity_plain": perplexity_plain,
        "perplexity": perplexity,
        "perplexity_difference": perplexity / perplexity_plain - 1,
        "logits_relative_rms": float(error),
    }


def _perplexity(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return math.exp(float(F.cross_entropy(logits, targets)))


def _demo() -> Path:
    from hybrimoe_plugin.demo.build import build_demo_model

    return build_demo_model("mixtral")


def _load(model_path: Path | None, gguf: Path, settings: dict[str, Any] | None) -> tuple[Any, Any]:
    """The plain model for None, else the injected one."""
    from hybrimoe_plugin import load_model
    from hybrimoe_plugin.hosts.transformers import load_plain_model

    if settings is None:
        return load_plain_model(model_path, gguf, dtype="float32", progress=False)
    return load_model(model_path, gguf, progress=False, **settings)


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Agreement with the plain model, one bar for each variant."""
    percents = [100 * share for share in column(rows, "token_agreement")]
    plots.bars(axes, column(rows, "model"), percents, "{:.1f} %")
    axes.set_xlim(0, 115)
    axes.set_title(
        f"Our operators choose the plain model's token in {percents[0]:.1f} % of positions"
    )
    axes.set_xlabel("same likeliest token as the plain model, % (measured)")


if __name__ == "__main__":
    main()
