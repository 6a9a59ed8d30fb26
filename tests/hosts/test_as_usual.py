"""What people do with any transformers model: an injected one gives what the plain one gives, or
refuses.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from steps import prefill, step
from torch import nn
from transformers.generation.configuration_utils import CompileConfig

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name
from hybrimoe_plugin.errors import BackendError, InputError
from hybrimoe_plugin.hosts.transformers import load_plain_model

IDS = tiny.tokens(9)
PAIR = tiny.tokens(9, batch=2)
GREEDY = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}

SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"accelerator": "emulated", "cache_ratio": 0.5},
    "qwen2_moe": {},
    "qwen3_moe": {"dense": "plain"},
    "deepseek_v2_lite": {"accelerator": "emulated", "cache_ratio": 0.25, "look_ahead": 1},
}
"""Family -> how it is loaded, beside float32 and experts in plain torch: results are the plain
model's then.
"""

Models = dict[str, tuple[Any, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    """Family -> (injected, plain)."""
    made = {}
    for family, settings in SETTINGS.items():
        path = tiny.write(tmp_path_factory.mktemp(family), family)
        plain, _ = load_plain_model(None, path, dtype="float32", progress=False)
        made[family] = _load(path, cpu_backend="torch", **settings), plain
    yield made
    for injected, _ in made.values():
        injected.hybrimoe.close()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("stored"), "mixtral", types=_quantised)


def _quantised(name: str) -> str:
    wide = ("_exps", "_shexp.", "attn_q.", "attn_k.", "attn_v.", "attn_output.")
    return "Q8_0" if name.endswith("weight") and any(part in name for part in wide) else "F32"


def _load(path: Path, **settings: Any) -> Any:
    return load_model(None, path, dtype="float32", progress=False, **settings)[0]


def _outputs(found: Any) -> list[Any]:
    """All that a forward pass gave; tuples with their length, so that one too many shows."""
    values = [found.logits]
    values += [
        value for name in ("loss", "aux_loss") if (value := getattr(found, name, None)) is not None
    ]
    for name in ("hidden_states", "router_logits"):
        if getattr(found, name, None) is not None:
            values.append(list(getattr(found, name)))
    return values


def _call(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    def use(model: Any) -> Any:
        with torch.no_grad():
            return _outputs(model(*args, **kwargs))

    return use


def _generate(ids: torch.Tensor = IDS, **options: Any) -> Callable[[Any], Any]:
    return lambda model: model.generate(ids, **{**GREEDY, **options})


def _steps(**options: Any) -> Callable[[Any], Any]:
    """Every step of an answer."""

    def use(model: Any) -> Any:
        options_ = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, **options}
        found = model.generate(IDS, **options_)
        hidden = [list(step) for step in found.hidden_states or ()]
        return [found.sequences, list(found.logits), *hidden]

    return use


def _left_padded(model: Any) -> Any:
    ids, mask = PAIR.clone(), torch.ones_like(PAIR)
    ids[0, :4] = mask[0, :4] = 0
    return model.generate(ids, attention_mask=mask, **GREEDY)


def _right_padded(model: Any) -> Any:
    mask = torch.ones_like(PAIR)
    mask[0, -4:] = 0
    with torch.no_grad():
        logits = model(PAIR, attention_mask=mask).logits
    return [logits[0, :5], logits[1]]


def _by_config(model: Any) -> Any:
    model.config.output_router_logits = model.config.output_hidden_states = True
    try:
        return [_call(IDS, labels=IDS)(model), _steps()(model)]
    finally:
        model.config.output_router_logits = model.config.output_hidden_states = False


def _embedded(model: Any) -> Any:
    embeds = model.get_input_embeddings()(IDS).detach()
    return [*_call(inputs_embeds=embeds)(model), model.generate(inputs_embeds=embeds, **GREEDY)]


def _with_gradients_enabled(model: Any) -> Any:
    return [
        model(IDS).logits.detach(),
        model(IDS[:, :1]).logits.detach(),
        model(IDS, labels=IDS).loss.detach(),
    ]


def _training(model: Any) -> Any:
    model.train()
    try:
        return _call(IDS)(model)
    finally:
        model.eval()


def _continued(model: Any) -> Any:
    first = model.generate(IDS, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, tiny.tokens(3, seed=5)], dim=1)
    return model.generate(longer, **{cache_name(model): cache_in(first)}, **GREEDY)


def _forked(model: Any) -> Any:
    """Two sequences go on from one prompt, each in a copy of its cache."""
    with torch.no_grad():
        cache = prefill(model, IDS)
        fork = copy.copy(cache)
        fork.layers = [copy.copy(layer) for layer in cache.layers]
        ways = [
            (each, ids) for ids in (IDS[:, :1], IDS[:, 1:2], IDS[:, 2:3]) for each in (cache, fork)
        ]
        return [step(model, ids if each is cache else ids + 9, each).logits for each, ids in ways]


def _gone_back(model: Any) -> Any:
    """What was held of a cache before it was cropped and gone on with is still that."""
    with torch.no_grad():
        cache = prefill(model, IDS)
        held = [(layer.keys, layer.values) for layer in cache.layers]
        cache.crop(-4)
        found = [step(model, IDS[:, at : at + 1] + 9, cache).logits for at in range(3)]
        for layer, (keys, values) in zip(cache.layers, held, strict=True):
            layer.keys, layer.values = keys, values
        return [*found, step(model, IDS[:, :1], cache).logits]


def _untouched(model: Any) -> Any:
    """What changes nothing is no matter."""
    model.tie_weights()
    model.to("cpu").float().eval()
    model.resize_token_embeddings(96)
    model.set_input_embeddings(model.get_input_embeddings())
    model.set_attn_implementation("sdpa")
    return _call(IDS)(model)


USES: dict[str, Callable[[Any], Any]] = {
    "labels": _call(IDS, labels=IDS),
    "gradients enabled": _with_gradients_enabled,
    "output_router_logits": _call(IDS, labels=IDS, output_router_logits=True),
    "output_hidden_states": _call(IDS, output_hidden_states=True, logits_to_keep=1),
    "output_hidden_states in decode": _steps(output_hidden_states=True),
    "outputs asked for by config": _by_config,
    "left padding": _left_padded,
    "right padding": _right_padded,
    "position_ids": _call(IDS, position_ids=torch.arange(5, 14)[None]),
    "inputs_embeds": _embedded,
    "logits_to_keep as indices": _call(IDS, logits_to_keep=torch.tensor([1, 3])),
    "beams": _generate(num_beams=3, num_return_sequences=2),
    "prompt lookup": _generate(prompt_lookup_num_tokens=3, max_new_tokens=8),
    "prefill in chunks": _generate(prefill_chunk_size=4),
    "no cache": _generate(use_cache=False),
    "a cache gone on with": _continued,
    "a cache forked": _forked,
    "a cache gone back to": _gone_back,
    "static cache": _generate(cache_implementation="static"),
    "train()": _training,
    "nothing changed": _untouched,
}


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_uses_give_what_the_plain_model_gives(family: str, models: Models) -> None:
    injected, plain = models[family]
    for name, use in USES.items():
        torch.testing.assert_close(
            use(injected), use(plain), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_assistant_speeds_it_up_and_changes_nothing(family: str, models: Models) -> None:
    injected, plain = models[family]
    assisted = injected.generate(
        IDS, assistant_model=tiny.model(family), **{**GREEDY, "max_new_tokens": 8}
    )
    assert torch.equal(assisted, plain.generate(IDS, **{**GREEDY, "max_new_tokens": 8}))


def _compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")(IDS).logits


def _compiled_base(model: Any) -> Any:
    return torch.compile(model.model, backend="eager")(IDS).last_hidden_state


def _compiled_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    try:
        return model(IDS).logits
    finally:
        for layer in model.model.layers:
            layer._compiled_call_impl = None


def _compiled_by_generate(model: Any) -> Any:
    compiled = CompileConfig(backend="eager", fullgraph=False)
    compiled._compile_all_devices = True  # transformers does it on a GPU only
    return model.generate(IDS, cache_implementation="static", compile_config=compiled, **GREEDY)


@pytest.mark.parametrize(
    "use", [_compiled, _compiled_base, _compiled_layers, _compiled_by_generate]
)
def test_torch_compile_leaves_the_operators_alone(
    use: Callable[[Any], Any], models: Models
) -> None:
    injected, plain = models["mixtral"]
    uncompiled = {
        _compiled_base: lambda m: m.model(IDS).last_hidden_state,
        _compiled_by_generate: _generate(),
    }
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = uncompiled.get(use, lambda m: m(IDS).logits)(plain)
        torch.testing.assert_close(use(injected), wanted)
        torch.testing.assert_close(injected(IDS).logits, plain(IDS).logits)


def _grown(model: Any) -> Any:
    return model.resize_token_embeddings(100)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
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
    "output_attentions in decode": (_steps(output_attentions=True), "output_attentions"),
    "eager attention": (lambda m: m.set_attn_implementation("eager"), "set_attn_implementation"),
    "flex attention": (
        lambda m: m.model.set_attn_implementation("flex_attention"),
        "set_attn_implementation",
    ),
}


@pytest.mark.parametrize("use", sorted(REFUSED))
def test_what_would_go_wrong_is_refused(use: str, models: Models) -> None:
    call, message = REFUSED[use]
    injected, plain = models["qwen2_moe"]
    with pytest.raises(BackendError, match=message):
        call(injected)
    with torch.no_grad():
        torch.testing.assert_close(injected(IDS[:, :2]).logits, plain(IDS[:, :2]).logits)


@pytest.mark.parametrize("given", [IDS[:, :0], IDS[:0]])
def test_no_tokens_are_no_input(given: Any, models: Models) -> None:
    with pytest.raises(InputError, match="hold no token"):
        models["qwen2_moe"][0](given)


def test_attention_dropout_is_refused_in_training(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    injected, _ = models["qwen2_moe"]
    monkeypatch.setattr(injected.config, "attention_dropout", 0.1)
    _call(IDS)(injected)
    with pytest.raises(BackendError, match="attention_dropout is 0.1"):
        _training(injected)


GRADIENTS: dict[str, tuple[dict[str, Any], bool]] = {
    "torch": ({"cpu_backend": "torch"}, True),
    "torch, dense plain": ({"cpu_backend": "torch", "dense": "plain"}, True),
    "emulated": ({"cpu_backend": "torch", "accelerator": "emulated", "cache_ratio": 0.5}, False),
    "ggml, dense plain": ({"cpu_backend": "ggml", "dense": "plain"}, False),
    "ggml, linears plain": ({"cpu_backend": "ggml", "linears": "plain"}, False),
    "kt-kernel": ({"cpu_backend": "kt", "dense": "plain"}, False),
    "matrices as stored": ({"cpu_backend": "torch", "linears": "quantised"}, False),
}


@pytest.mark.parametrize("way", sorted(GRADIENTS))
def test_gradients_are_right_or_refused(way: str, stored: Path) -> None:
    settings, right = GRADIENTS[way]
    if not right and way != "emulated":
        needs.kt_kernel()
    plain, _ = load_plain_model(None, stored, dtype="float32", progress=False)
    model = _load(stored, **settings)
    found = []
    for each in (model, plain):
        each.requires_grad_(False)
        weight = each.model.layers[0].input_layernorm.weight.requires_grad_(True)
        loss = each(IDS, labels=IDS).loss
        if each is model and not right:
            with pytest.raises(BackendError, match="without gradients"):
                loss.backward()
            assert weight.grad is None
        else:
            loss.backward()
            found.append(weight.grad)
    if right:
        torch.testing.assert_close(*found)
    model.hybrimoe.close()


def test_a_bias_inside_a_graph_has_no_gradient_either(tmp_path: Path) -> None:
    needs.kt_kernel()
    model = _load(
        tiny.write(tmp_path, "qwen2_moe", types=_quantised),
        linears="quantised",
        cpu_backend="torch",
    ).requires_grad_(False)
    attention = model.model.layers[1].self_attn
    attention.k_proj.bias.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)  # else no loss would ask for gradients
    with pytest.raises(BackendError, match="a matrix as stored"):
        model(IDS, labels=IDS).loss.backward()
    model.hybrimoe.close()


def test_a_linear_that_is_replaced_later_counts(models: Models) -> None:
    """What PEFT does to attention: the module around the old one must be called, and not the old
    one.
    """
    injected, _ = models["qwen2_moe"]
    attention = injected.model.layers[0].self_attn
    before = attention.v_proj

    class Doubled(nn.Module):
        bias = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            doubled: torch.Tensor = 2 * before(x)
            return doubled

    (once,) = _call(IDS)(injected)
    attention.v_proj = Doubled()
    try:
        (twice,) = _call(IDS)(injected)
    finally:
        attention.v_proj = before
    assert not torch.allclose(once, twice)
    torch.testing.assert_close(_call(IDS)(injected), [once])


@pytest.mark.parametrize(
    "settings", [{"cpu_backend": "torch"}, {"cpu_backend": "torch", "dense": "plain"}]
)
def test_a_restored_model_says_what_it_lacks_until_it_is_filled(
    settings: dict[str, Any], stored: Path, tmp_path: Path
) -> None:
    plain, _ = load_plain_model(None, stored, dtype="float32", progress=False)
    model = _load(stored, **settings)
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
    model.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(_call(IDS)(copy.deepcopy(model)), _call(IDS)(plain))
    torch.testing.assert_close(
        _call(IDS)(model.half().float()), _call(IDS)(plain), atol=1e-2, rtol=1e-2
    )
    model.save_pretrained(tmp_path)


def test_a_closed_model_says_so(stored: Path) -> None:
    model = _load(stored, cpu_backend="torch")
    model.hybrimoe.close()
    model.hybrimoe.close()
    for call in (
        lambda: model(IDS),
        lambda: model.model(IDS),
        lambda: model.generate(IDS, **GREEDY),
    ):
        with pytest.raises(BackendError, match="closed"):
            call()
