"""Does the injected model say what the plain model says?

Measured on text that ships with Python (`pydoc_data.topics`): the share of positions at which both
find the same next token likeliest, and the difference in perplexity. The plain model is
transformers' own, every weight dequantised, in float32; what differs is the rounding of activations
in the quantised kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from eval import report
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name

CHUNK_TOKENS = 256
DECODED = 32
TOPICS = ("for", "exceptions", "numbers", "strings", "class", "lambda", "naming", "assignment")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives what the JSON line says."""
    parser = report.parser(__doc__ or "")
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
    variants: dict[str, dict[str, Any]] = {
        "injected": {"accelerator": "none"},
        "injected, plain linears": {"accelerator": "none", "linears": "plain", "dtype": "float32"},
        "injected, kt-kernel workers": {
            "accelerator": "none",
            "cpu_backend": "kt",
            "dtype": "float32",
        },
    }
    for name, settings in list(variants.items())[: 2 if args.quick else None]:
        model, _ = _load(args.model_path, gguf, settings)
        rows.append(
            {"model": name, **compare(chunks, wanted, [logits(model, chunk) for chunk in chunks])}
        )
        model.hybrimoe.close()
        del model
    report.show(
        f"Against the plain model in float32, {len(chunks)} x {CHUNK_TOKENS} tokens of pydoc's "
        f"topics",
        rows,
    )
    report.save_csv(args.out / "fidelity.csv", rows)
    report.save_figure(args.out / "fidelity.png", lambda axes: _draw(axes, rows), height=2.6)
    result = {
        key: rows[0][key]
        for key in ("token_agreement", "perplexity_difference", "logits_relative_rms")
    }
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
    if len(ids) < count * CHUNK_TOKENS:
        raise ValueError(
            f"the text has {len(ids)} tokens, {count} chunks need {count * CHUNK_TOKENS}"
        )
    return [
        ids[None, start : start + CHUNK_TOKENS]
        for start in range(0, count * CHUNK_TOKENS, CHUNK_TOKENS)
    ]


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[T, V] float32: one prefill, then the last `DECODED` positions token by token, as in an
    answer.
    """
    first = max(1, ids.shape[1] - DECODED)
    keyword = cache_name(model)
    out = model(ids[:, :first], use_cache=True)
    parts = [out.logits[0]]
    for at in range(first, ids.shape[1]):
        out = model(ids[:, at : at + 1], **{keyword: cache_in(out)}, use_cache=True)
        parts.append(out.logits[0])
    return torch.cat(parts).float()


def compare(
    chunks: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Agreement of the likeliest tokens, perplexities and relative error of the logits, over all
    chunks.

    A position counts as agreeing only if the one likeliest token is the same; near ties are not
    forgiven.
    """
    targets = torch.cat([chunk[0, 1:] for chunk in chunks])
    plain = torch.cat([part[:-1] for part in wanted])
    ours = torch.cat([part[:-1] for part in found])
    losses = [float(F.cross_entropy(part, targets)) for part in (plain, ours)]
    return {
        "token_agreement": float((plain.argmax(-1) == ours.argmax(-1)).float().mean()),
        "perplexity_plain": math.exp(losses[0]),
        "perplexity": math.exp(losses[1]),
        "perplexity_difference": math.exp(losses[1]) / math.exp(losses[0]) - 1,
        "logits_relative_rms": float((ours - plain).norm() / plain.norm()),
    }


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


def _draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    places = range(len(rows))
    axes.barh(places, [100 * row["token_agreement"] for row in rows], color="tab:green")
    axes.set_yticks(places, [row["model"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(90, 100)
    axes.set_xlabel("same likeliest token as the plain model, % (measured)")


if __name__ == "__main__":
    main()
