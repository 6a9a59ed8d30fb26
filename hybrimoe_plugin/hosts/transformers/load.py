"""Load a model: meta-device skeleton, rules, dense weights from GGUF, operators, engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from hybrimoe_plugin.decode.connect import connect_layers
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.device.memory import check_host, free_host_bytes
from hybrimoe_plugin.engine.turns import Turns, take_turns
from hybrimoe_plugin.errors import BudgetError, ConfigError, RulesError, WeightsError
from hybrimoe_plugin.hosts.transformers.as_usual import Guard
from hybrimoe_plugin.hosts.transformers.complete import check_complete
from hybrimoe_plugin.hosts.transformers.config import model_config
from hybrimoe_plugin.hosts.transformers.devices import spread
from hybrimoe_plugin.hosts.transformers.generation import set_generation
from hybrimoe_plugin.hosts.transformers.stored import (
    give_stored,
    keeps_stored,
    read_if_worth_it,
    without_plain,
)
from hybrimoe_plugin.hosts.transformers.tokenizer import load_tokenizer
from hybrimoe_plugin.injection.inject import Injection, inject
from hybrimoe_plugin.injection.match import Match, plan_injection, with_settings
from hybrimoe_plugin.injection.rules import Rules, load_rules
from hybrimoe_plugin.operators.bind import bind
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.parameter_source import ParameterSource

log = logging.getLogger(__name__)

FAMILY_RULES = {
    "mixtral": "Mixtral.yaml",
    "qwen2_moe": "Qwen2-MoE.yaml",
    "qwen3_moe": "Qwen3-MoE.yaml",
    "deepseek_v2": "DeepSeek-V2.yaml",
    "deepseek_v3": "DeepSeek-V3.yaml",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPE = torch.bfloat16


def load_model(
    model_path: str | Path | None = None,
    gguf_path: str | Path | None = None,
    rules: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    trust_rules: bool = False,
    progress: bool = True,
    **settings: Any,
) -> tuple[Any, Any]:
    """Load a causal language model with injected operators, ready for `generate`.

    Args:
        model_path: directory with config and tokenizer; both come from the GGUF where it is not
            given.
        gguf_path: GGUF file, any part of a split set, or a directory with one model; default
            `model_path`.
        rules: rules file, or the name of a packaged one; default the packaged rules of the model's
            family.
        dtype: of the dense weights and activations; default float32 where dense matrices stay as
            stored, else bfloat16.
        trust_rules: let rules import operators from any package.
        progress: show bars on stderr while loading and calibrating.
        settings: fields of `hybrimoe_plugin.config.Settings`; they override the rules' kwargs.

    Returns:
        (model, tokenizer). The model is an ordinary transformers model; `model.hybrimoe` reads
        counters, draws timelines and restores it. The tokenizer is None where neither source holds
        one.

    Raises:
        HybriMoEError: one of its kinds, before anything is half done.
    """
    store = _open(model_path, gguf_path)
    config = model_config(model_path, store)
    tokenizer = load_tokenizer(model_path, store, config)
    model = meta_model(config, _dtype(dtype))
    check_complete(model, store, config)
    set_generation(model, tokenizer, store.metadata, model_path, config.vocab_size)
    parsed = load_rules(rules_path(rules, config))
    plan = without_plain(
        with_settings(plan_injection(model, parsed, trust_rules=trust_rules), settings)
    )
    if dtype is None and any(keeps_stored(match, store) for match in plan):
        # No large tensor is left in the model's own type, and small CPU operations are quickest in
        # float32.
        model.to(torch.float32)
    read_if_worth_it(plan, store)
    injection = inject(model, plan, store, config)
    try:
        # Before weights are read: everything that can be refused is.
        for operator in experts_operators(model):
            operator.load()
        give_stored(model, store, config)
        load_dense(model, store, config, injection, progress=progress)
        store.check_unchanged()  # from here on kernels read it where it lies
        unhook = _spread(model)
        model.hybrimoe = bind(model, progress=progress) if experts_operators(model) else None
        turns = Turns() if model.hybrimoe is None else model.hybrimoe.turns
        turns.before.append(store.check_unchanged)
        unhook_rows = connect_layers(model, turns)
        guard = Guard(model)
        unhook_turns = take_turns(model, turns)
    except BaseException:
        injection.restore()
        raise
    if model.hybrimoe is not None:
        model.hybrimoe.on_restore = _all(
            unhook_turns, guard.remove, unhook, unhook_rows, injection.restore, guard.restored
        )
    log.info("memory left on the host: %d bytes", free_host_bytes())
    return model, tokenizer


def load_plain_model(
    model_path: str | Path | None = None,
    gguf_path: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
) -> tuple[Any, Any]:
    """The same model without injection, every weight dequantised: the oracle. Raises as
    `load_model`.
    """
    store = _open(model_path, gguf_path)
    config = model_config(model_path, store)
    tokenizer = load_tokenizer(model_path, store, config)
    model = meta_model(config, _dtype(dtype))
    check_complete(model, store, config)
    set_generation(model, tokenizer, store.metadata, model_path, config.vocab_size)
    load_dense(model, store, config, None, progress=progress)
    return model, tokenizer


def meta_model(config: Any, dtype: torch.dtype = DEFAULT_DTYPE) -> Any:
    """The model's skeleton on the meta device.

    Raises:
        WeightsError: transformers cannot build it from this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            ).eval()
    except Exception as error:  # transformers raises many kinds
        raise WeightsError(
            f"transformers cannot build a {type(config).__name__} model: {error}"
        ) from error


def rules_path(rules: str | Path | None, config: Any) -> Path:
    """The rules file: as given, a packaged name, or the packaged one of the model's family.

    Raises:
        RulesError: no such file, or no packaged rules for this family.
    """
    packaged = Path(str(files("optimize_rules")))
    if rules is None:
        name = FAMILY_RULES.get(config.model_type)
        if name is None:
            known = ", ".join(sorted(FAMILY_RULES))
            raise RulesError(
                f"no packaged rules for model type {config.model_type!r} (there are for {known})"
            )
        return packaged / name
    path = Path(rules)
    if path.exists():
        return path
    for candidate in (packaged / path, packaged / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    raise RulesError(
        f"{rules}: no such rules file, and no packaged rules of that name in {packaged}"
    )


def plan_for(
    model_path: str | Path | None,
    gguf_path: str | Path | None,
    rules: str | Path | None = None,
    *,
    trust_rules: bool = False,
    **settings: Any,
) -> tuple[Any, Rules, list[Match]]:
    """Dry run: (model on the meta device, rules, plan); no weight is read. Raises as
    `load_model`.
    """
    has_config = model_path is not None and (Path(model_path) / "config.json").exists()
    store = _open(model_path, gguf_path) if gguf_path is not None or not has_config else None
    config = model_config(model_path, store)
    model = meta_model(config)
    if store is not None:
        check_complete(model, store, config)
    parsed = load_rules(rules_path(rules, config))
    plan = with_settings(plan_injection(model, parsed, trust_rules=trust_rules), settings)
    return model, parsed, without_plain(plan)


def experts_operators(model: nn.Module) -> list[HybriMoEExperts]:
    return [module for module in model.modules() if isinstance(module, HybriMoEExperts)]


def load_dense(
    model: Any, store: GGUFStore, config: Any, injection: Injection | None, *, progress: bool = True
) -> None:
    """Fill every parameter that is still on the meta device, rebuild computed buffers, tie weights.

    Raises:
        WeightsError: a tensor is missing or does not fit.
        BudgetError: the dense weights do not fit into memory.

    Mutates: `model`.
    """
    source = ParameterSource(store, config)
    # A table that stays as stored is nothing to tie to; a plain head then reads its own copy.
    has_table = isinstance(getattr(model.get_input_embeddings(), "weight", None), torch.Tensor)
    tied = {"lm_head.weight"} if config.tie_word_embeddings and has_table else set()
    wanted = {
        name: value
        for name, value in model.state_dict().items()
        if name not in tied and value.is_meta
    }
    check_host(
        sum(value.numel() * value.element_size() for value in wanted.values()), "the dense weights"
    )
    # Checked as a whole before the first is read, so that a wrong file fails at once.
    for name in wanted:
        for part in source.parts(name):
            store.info(part)
    device = _dense_device(model)
    loaded = {}
    try:
        for name, value in tqdm(
            wanted.items(), desc="loading weights", disable=not progress, leave=False, unit="tensor"
        ):
            loaded[name] = source.load(name, value.shape, value.dtype, device)
    except torch.cuda.OutOfMemoryError as error:
        raise BudgetError(f"the dense weights do not fit on the accelerator: {error}") from error
    model.load_state_dict(loaded, strict=False, assign=True)
    _rebuild_buffers(model, config)
    if tied:
        model.tie_weights()
    _place(model, injection)
    left = [
        name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta
    ]
    if left:
        raise WeightsError(
            f"{store.paths[0]}: nothing in the file for {', '.join(left[:5])} ({len(left)} in all)"
        )


def _open(model_path: str | Path | None, gguf_path: str | Path | None) -> GGUFStore:
    path = gguf_path if gguf_path is not None else model_path
    if path is None:
        raise ConfigError("name the weights: gguf_path, or a model_path that holds them")
    return GGUFStore.open(path)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return DEFAULT_DTYPE
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    return DTYPES[dtype]


def _rebuild_buffers(model: nn.Module, config: Any) -> None:
    """Buffers that a state dict does not hold (rotary frequencies) are computed anew, off the meta
    device.
    """
    for module in model.modules():
        missing = [
            name
            for name in module._non_persistent_buffers_set
            if _is_meta(module._buffers.get(name))
        ]
        if missing:
            fresh = type(module)(config)
            for name in missing:
                module._buffers[name] = fresh._buffers[name]


def _is_meta(value: torch.Tensor | None) -> bool:
    return value is not None and value.is_meta


def _dense_device(model: nn.Module) -> str:
    """Where dense weights are dequantised: on the one accelerator that the operators compute on,
    else on the CPU.
    """
    devices = {_real(operator.generate_device) for operator in experts_operators(model)} - {"cpu"}
    return devices.pop() if len(devices) == 1 and cuda_refusal() is None else "cpu"


def _place(model: nn.Module, injection: Injection | None) -> None:
    """Dense parts go to the accelerator where the operators compute there; `default` rules may say
    otherwise.
    """
    device = _dense_device(model)
    try:
        if device != "cpu":
            model.to(device)
        for name, device in (injection.devices if injection is not None else {}).items():
            if cuda_refusal() is None or device == "cpu":
                model.get_submodule(name).to(device)
    except torch.cuda.OutOfMemoryError as error:
        raise BudgetError(f"the dense weights do not fit on the accelerator: {error}") from error


def _spread(model: nn.Module) -> Callable[[], None]:
    """Where experts lie on several devices, the layers around them follow; gives what undoes it."""
    places = {
        operator.key: _real(operator.generate_device) for operator in experts_operators(model)
    }
    places = {key: device for key, device in places.items() if device != "cpu"}
    if len(set(places.values())) < 2 or cuda_refusal() is not None:
        return lambda: None
    try:
        return spread(model, places)
    except torch.cuda.OutOfMemoryError as error:
        raise BudgetError(f"the dense weights do not fit on the accelerators: {error}") from error


def _all(*parts: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        for part in parts:
            part()

    return call


def _real(device: str) -> str:
    if device != "auto":
        return device
    return "cuda:0" if cuda_refusal() is None else "cpu"
