"""Give a model what no kernel may see, in a process of its own: prints a line of JSON for each case
that ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.hosts.transformers import load_plain_model
from hybrimoe_plugin.operators.norm import FusedRMSNorm

PROMPT = torch.arange(5, 9)[None]
TOKEN = torch.tensor([[3]])


def step(model: Any, prompt: torch.Tensor = PROMPT, **given: Any) -> torch.Tensor:
    logits: torch.Tensor = model(
        **{cache_name(model): cache_in(model(prompt, use_cache=True))}, **given
    ).logits
    return logits


def experts(model: Any, **changes: Any) -> torch.Tensor:
    """The experts of the first layer, called as the engine calls them."""
    given = {
        "hidden": torch.ones(1, model.config.hidden_size),
        "topk_ids": torch.tensor([[0, 1]]),
        "topk_weights": torch.ones(1, 2),
    }
    cpu = model.hybrimoe.engines[0].cpu
    assert isinstance(cpu, GgmlExperts)
    return cpu.compute(0, **{**given, **changes})


def refused(width: int) -> dict[str, Callable[[Any], Any]]:
    """Calls that must raise an error of the project's own."""
    steps: dict[str, dict[str, Any]] = {
        "float token": {"input_ids": torch.tensor([[3.0]])},
        "NaN token": {"input_ids": torch.tensor([[float("nan")]])},
        "bool token": {"input_ids": torch.tensor([[True]])},
        "complex token": {"input_ids": torch.tensor([[3j]])},
        "negative token": {"input_ids": torch.tensor([[-1]])},
        "token 2^32": {"input_ids": torch.tensor([[2**32]])},
        "token 2^62": {"input_ids": torch.tensor([[2**62]])},
        "narrow embedding": {"inputs_embeds": torch.ones(1, 1, width // 2)},
        "wide embedding": {"inputs_embeds": torch.ones(1, 1, 2 * width)},
        "embedding of one value": {"inputs_embeds": torch.ones(1, 1, 1)},
        "narrow embeddings": {"inputs_embeds": torch.ones(1, 2, width // 2)},
        "embedding without a batch": {"inputs_embeds": torch.ones(1, width)},
        "two positions for a token": {"input_ids": TOKEN, "position_ids": torch.tensor([[4, 5]])},
        "as many positions as angles": {"input_ids": TOKEN, "position_ids": torch.arange(16)[None]},
        "no position": {"input_ids": TOKEN, "position_ids": torch.zeros(1, 0, dtype=torch.long)},
        "positions without a batch": {"input_ids": TOKEN, "position_ids": torch.tensor([4])},
        "positions of another batch": {
            "input_ids": TOKEN,
            "position_ids": torch.tensor([[4], [5]]),
        },
        "cache of another batch": {"input_ids": TOKEN, "prompt": torch.cat((PROMPT, PROMPT))},
        "batch of another cache": {"input_ids": torch.cat((TOKEN, TOKEN))},
    }
    to_experts: dict[str, dict[str, Any]] = {
        "float expert": {"topk_ids": torch.tensor([[0.0, 1.0]])},
        "no such expert": {"topk_ids": torch.tensor([[0, 8]])},
        "expert 2^32": {"topk_ids": torch.tensor([[0, 2**32]])},
        "whole hidden states": {"hidden": torch.ones(1, width, dtype=torch.long)},
        "complex weights": {"topk_weights": torch.ones(1, 2, dtype=torch.complex64)},
        "hidden states elsewhere": {"hidden": torch.ones(1, width, device="meta")},
        "no hidden states": {
            "hidden": torch.ones(0, width),
            "topk_ids": torch.ones(0, 2, dtype=torch.long),
            "topk_weights": torch.ones(0, 2),
        },
    }
    calls: dict[str, Callable[[Any], Any]] = {
        name: (lambda model, given=given: step(model, **given)) for name, given in steps.items()
    }
    calls.update(
        {
            name: (lambda model, given=given: experts(model, **given))
            for name, given in to_experts.items()
        }
    )
    calls["head on a row of another width"] = lambda model: model.lm_head(torch.ones(2, width // 2))
    calls["norm of a row of another width"] = lambda model: model.model.norm(
        torch.ones(2, width // 2)
    )
    return calls


def odd_epsilon(eps: float) -> None:
    """A norm with such a constant gives what torch's own gives."""
    original = SimpleNamespace(weight=torch.randn(64), variance_epsilon=eps)
    norm = FusedRMSNorm("norm", None, None, original, prefill_device="cpu", generate_device="cpu")  # type: ignore[arg-type]
    x = torch.randn(1, 64)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (64,), original.weight, eps), equal_nan=True)


def same_nan(model: Any, plain: Any, width: int, bad: float) -> None:
    """A NaN or an infinity spreads as it does in the plain model, also to tokens that come after
    it.
    """
    given = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
    given[0, 1, 5] = bad
    found = []
    for each in (model, plain):
        out = each(inputs_embeds=given, use_cache=True)
        later = each(TOKEN, **{cache_name(each): cache_in(out)})
        one = step(each, inputs_embeds=given[:, 1:2])
        found.append(torch.cat((out.logits, later.logits, one), dim=1).isnan())
    assert torch.equal(*found), (
        f"NaN where the plain model has {found[1].sum()} of them: {found[0].sum()}"
    )


def main(path: str) -> None:
    model = load_model(None, path, progress=False, accelerator="none")[0]
    plain = load_plain_model(None, path, dtype="float32", progress=False)[0]
    width = model.config.hidden_size
    calls = refused(width)
    for eps in (0.0, -1.0, float("nan"), float("inf"), 1e-50):
        calls[f"epsilon {eps}"] = lambda _, eps=eps: odd_epsilon(eps)
    for bad in (float("nan"), float("inf")):
        calls[f"{bad} in an embedding"] = lambda model, bad=bad: same_nan(model, plain, width, bad)
    for name, call in calls.items():
        try:
            call(model)
            outcome = ["", ""]
        except Exception as error:
            outcome = [type(error).__name__, str(error)]
        print(json.dumps([f"{model.config.model_type}: {name}", *outcome]), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        for argument in sys.argv[1:]:
            main(argument)
