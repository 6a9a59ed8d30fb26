"""What an injected model cannot do is refused by its name, and gradients are right or refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from loading import injected, plain
from uses import (
    GREEDY,
    IDS,
    Models,
    Use,
    called,
    every_step,
    in_training,
    injected_and_plain,
    quantised,
    stored_mixtral,
)

from hybrimoe_plugin.errors import BackendError, InputError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    yield from injected_and_plain(tmp_path_factory, "qwen2_moe")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_mixtral(tmp_path_factory)


def _grown(model: Any) -> Any:
    return model.resize_token_embeddings(100)


REFUSED: dict[str, tuple[Use, str]] = {
    "save_pretrained": (
        lambda m: m.save_pretrained("nowhere"),
        "save_pretrained.*lack every weight",
    ),
    "save_pretrained of the base": (
        lambda m: m.model.save_pretrained("nowhere"),
        "save_pretrained.*lack every weight",
    ),
    "push_to_hub": (lambda m: m.push_to_hub("nobody/nothing"), "push_to_hub.*lack every weight"),
    "state_dict": (lambda m: m.state_dict(), "state_dict.*lack every weight"),
    "deepcopy": (copy.deepcopy, "copy.deepcopy: .*cannot be copied"),
    "pickle": (pickle.dumps, "pickle and torch.save: .*cannot be copied"),
    "torch.save": (
        lambda m: torch.save(m, io.BytesIO()),
        "pickle and torch.save: .*cannot be copied",
    ),
    "half": (
        lambda m: m.half(),
        r"to\(\): weights that are float32 on cpu cannot become float16 on cpu",
    ),
    "to a dtype": (lambda m: m.to(torch.bfloat16), "cannot become bfloat16 on cpu"),
    "to a device": (lambda m: m.to("meta"), "cannot become float32 on meta"),
    "to a device that is not there": (lambda m: m.to("xpu:7"), r"to\(\)"),
    "base to a dtype": (lambda m: m.model.double(), "cannot become float64 on cpu"),
    "to_empty": (lambda m: m.to_empty(device="cpu"), "to_empty"),
    "resize_token_embeddings": (_grown, "resize_token_embeddings"),
    "add_adapter": (lambda m: m.add_adapter(None), "adapters"),
    "load_adapter": (lambda m: m.load_adapter("anything"), "adapters"),
    "output_attentions": (lambda m: m(IDS, output_attentions=True), "output_attentions"),
    "output_attentions in decode": (every_step(output_attentions=True), "output_attentions"),
    "eager attention": (lambda m: m.set_attn_implementation("eager"), "set_attn_implementation"),
    "flex attention": (
        lambda m: m.model.set_attn_implementation("flex_attention"),
        "set_attn_implementation",
    ),
}


@pytest.mark.parametrize("use", sorted(REFUSED))
def test_what_would_go_wrong_is_refused(use: str, models: Models) -> None:
    call, message = REFUSED[use]
    model, right = models["qwen2_moe"]
    with pytest.raises(BackendError, match=message):
        call(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[:, :2]).logits, right(IDS[:, :2]).logits)


@pytest.mark.parametrize("given", [IDS[:, :0], IDS[:0]])
def test_no_tokens_are_no_input(given: Any, models: Models) -> None:
    with pytest.raises(InputError, match="hold no token"):
        models["qwen2_moe"][0](given)


def test_attention_dropout_is_refused_in_training(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = models["qwen2_moe"]
    monkeypatch.setattr(model.config, "attention_dropout", 0.1)
    called(IDS)(model)
    with pytest.raises(BackendError, match="attention_dropout is 0.1"):
        in_training(model)


GRADIENTS: dict[str, dict[str, Any]] = {
    "torch": {"cpu_backend": "torch"},
    "torch, dense plain": {"cpu_backend": "torch", "dense": "plain"},
}
NO_GRADIENTS: dict[str, dict[str, Any]] = {
    "emulated": {"cpu_backend": "torch", "accelerator": "emulated", "cache_ratio": 0.5},
    "ggml, dense plain": {"cpu_backend": "ggml", "dense": "plain"},
    "ggml, linears plain": {"cpu_backend": "ggml", "dense": "dequantised"},
    "kt-kernel": {"cpu_backend": "kt", "dense": "plain"},
    "matrices as stored": {"cpu_backend": "torch", "dense": "quantised"},
}


def loss_and_weight(model: Any) -> tuple[torch.Tensor, Any]:
    """A loss, and the only weight that asks for a gradient: one at the model's beginning."""
    model.requires_grad_(False)
    weight = model.model.layers[0].input_layernorm.weight
    weight.requires_grad_(True)
    return model(IDS, labels=IDS).loss, weight


@pytest.mark.parametrize("way", sorted(GRADIENTS))
def test_gradients_are_right(way: str, stored: Path) -> None:
    model = injected(stored, **GRADIENTS[way])
    gradients = []
    for each in (model, plain(stored)):
        loss, weight = loss_and_weight(each)
        loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)
    model.hybrimoe.close()


@pytest.mark.parametrize("way", sorted(NO_GRADIENTS))
def test_gradients_are_refused(way: str, stored: Path) -> None:
    if way != "emulated":
        needs.kt_kernel()
    model = injected(stored, **NO_GRADIENTS[way])
    loss, weight = loss_and_weight(model)
    with pytest.raises(BackendError, match="without gradients"):
        loss.backward()
    assert weight.grad is None
    model.hybrimoe.close()


def test_a_bias_inside_a_graph_has_no_gradient_either(tmp_path: Path) -> None:
    needs.kt_kernel()
    model = injected(
        tiny.write(tmp_path, "qwen2_moe", types=quantised),
        dense="quantised",
        cpu_backend="torch",
    ).requires_grad_(False)
    attention = model.model.layers[1].self_attn
    attention.k_proj.bias.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)  # else no loss would ask for gradients
    with pytest.raises(BackendError, match="a matrix as stored"):
        model(IDS, labels=IDS).loss.backward()
    model.hybrimoe.close()


@pytest.mark.parametrize(
    "settings", [{"cpu_backend": "torch"}, {"cpu_backend": "torch", "dense": "plain"}]
)
def test_a_restored_model_says_what_it_lacks_until_it_is_filled(
    settings: dict[str, Any], stored: Path, tmp_path: Path
) -> None:
    right = plain(stored)
    model = injected(stored, **settings)
    for name in REFUSED:
        if name.startswith(("save", "deepcopy")):
            with pytest.raises(BackendError):
                REFUSED[name][0](model)
    model.hybrimoe.restore()
    for call in (
        lambda: model(IDS),
        lambda: model.model(IDS),
        lambda: model.generate(IDS, **GREEDY),
        lambda: model.save_pretrained(tmp_path),
        lambda: copy.deepcopy(model),
    ):
        with pytest.raises(BackendError, match="was restored, and .* never had weights of its own"):
            call()
    model.load_state_dict(right.state_dict(), assign=True)
    torch.testing.assert_close(called(IDS)(copy.deepcopy(model)), called(IDS)(right))
    torch.testing.assert_close(
        called(IDS)(model.half().float()), called(IDS)(right), atol=1e-2, rtol=1e-2
    )
    model.save_pretrained(tmp_path)


def test_a_closed_model_says_so(stored: Path) -> None:
    model = injected(stored, cpu_backend="torch")
    model.hybrimoe.close()
    model.hybrimoe.close()
    for call in (
        lambda: model(IDS),
        lambda: model.model(IDS),
        lambda: model.generate(IDS, **GREEDY),
    ):
        with pytest.raises(BackendError, match="closed"):
            call()
