"""Load a model: meta-device skeleton, rules, dense weights from GGUF, operators, engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hybrimoe_plugin.compute.cpu.openmp import release_team
from hybrimoe_plugin.decode.connect import connect_layers
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.device.memory import check_host, free_host_bytes
from hybrimoe_plugin.engine.turns import Turns, take_turns
from hybrimoe_plugin.errors import BudgetError, ConfigError, WeightsError
from hybrimoe_plugin.families.registry import names_of
from hybrimoe_plugin.hosts.transformers.as_usual import Guard
from hybrimoe_plugin.hosts.transformers.batches import follow_batches
from hybrimoe_plugin.hosts.transformers.complete import check_complete
from hybrimoe_plugin.hosts.transformers.config import model_config
from hybrimoe_plugin.hosts.transformers.devices import spread
from hybrimoe_plugin.hosts.transformers.generation import set_generation
from hybrimoe_plugin.hosts.transformers.preparation.accelerators import idle_cache
from hybrimoe_plugin.hosts.transformers.preparation.parameters import missing_parameters, tied
from hybrimoe_plugin.hosts.transformers.preparation.places import (
    dense_device,
    experts_on_several,
    experts_operators,
)
from hybrimoe_plugin.hosts.transformers.preparation.predict import predict
from hybrimoe_plugin.hosts.transformers.preparation.prediction import Prediction
from hybrimoe_plugin.hosts.transformers.preparation.prepare import open_weights, prepare
from hybrimoe_plugin.hosts.transformers.skeleton import dtype_of, meta_model, rebuild_buffers
from hybrimoe_plugin.hosts.transformers.stored import give_stored, reads_into_memory
from hybrimoe_plugin.hosts.transformers.tokenizer import load_tokenizer
from hybrimoe_plugin.injection.inject import Injection
from hybrimoe_plugin.injection.match import checked_settings
from hybrimoe_plugin.operators.bind import bind
from hybrimoe_plugin.weights.find_experts import AnySource, source_of
from hybrimoe_plugin.weights.gguf_store import GGUFStore

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hybrimoe_plugin.setting_types import EngineSettings

log = logging.getLogger(__name__)


def load_model(
    model_path: str | Path | None = None,
    gguf_path: str | Path | None = None,
    rules: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    trust_rules: bool = False,
    progress: bool = True,
    require_tokenizer: bool = False,
    **settings: Unpack[EngineSettings],
) -> tuple[Any, Any]:
    """Load a causal language model with injected operators, ready for `generate`.

        model, tokenizer = load_model(gguf_path="model.gguf", cache_ratio=0.25)
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
        print(model.hybrimoe)

    Args:
        model_path: directory with config and tokenizer; both come from the GGUF where it is not
            given. Its own safetensors files are read as they are where they hold BF16, F16 or F32.
        gguf_path: GGUF file, any part of a split set, or a directory with one model; default
            `model_path`.
        rules: rules file, or the name of a packaged one; default the packaged rules of the model's
            family.
        dtype: of the dense weights and activations; default float32 where dense matrices stay as
            stored, else bfloat16.
        trust_rules: let rules import operators from any package.
        progress: show bars on stderr while loading and calibrating.
        require_tokenizer: refuse a model without one, before the machine is measured for it.
        settings: of the engine, such as `cache_ratio=0.25`, `accelerator="cuda"`, `context=32768`
            or `cpu_threads=4`. `help(hybrimoe_plugin.EngineSettings)` lists all of them and
            docs/settings.md explains them. They override the rules' kwargs.

    Returns:
        (model, tokenizer). The model is an ordinary transformers model; `model.hybrimoe` reads
        counters, draws timelines and restores it. The tokenizer is None where neither source holds
        one.

    Raises:
        ConfigError: a setting is unknown, or has a value that is not allowed.
        RulesError: the rules cannot be read, or do not fit the model.
        WeightsError: the weights cannot be read, or are another model's.
        BudgetError: the model does not fit into memory; told before a weight is read.
        BackendError: the CPU kernels or the accelerator that were asked for cannot be used.
    """
    try:
        checked_settings(settings)
    except ConfigError as error:
        raise ConfigError(f"load_model: {error}") from None
    store = open_weights(model_path, gguf_path)
    model_path = model_path or store.directory
    prepared = prepare(
        model_path, store, rules, dtype=dtype, trust_rules=trust_rules, settings=settings
    )
    model, config = prepared.model, prepared.config
    tokenizer = load_tokenizer(model_path, store, config)
    if tokenizer is None and require_tokenizer:
        also = "" if model_path is None else f", and neither does {model_path}"
        raise ConfigError(
            f"{store.paths[0]}: holds no usable tokenizer{also}: give --model_path with the "
            "model's tokenizer"
        )
    set_generation(model, tokenizer, store.metadata, model_path, config.vocab_size)
    injection = prepared.inject()
    try:
        # Before weights are read: everything that can be refused is.
        check_memory(predict(prepared, injection.devices))
        idle = idle_cache(prepared.plan)
        if idle is not None:
            log.warning("%s", idle)
        if reads_into_memory(prepared.plan, store):
            store.read_into_memory()
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
        unfollow = follow_batches(model, model.hybrimoe)
        unhook_turns = take_turns(model, turns)  # last: a pass's turn covers all of the above
    except BaseException:
        injection.restore()
        raise
    if model.hybrimoe is not None:
        model.hybrimoe.on_restore = _all(
            *(unhook_turns, unfollow, guard.remove, unhook, unhook_rows),
            *(injection.restore, guard.restored),
        )
    log.info("memory left on the host: %d bytes", free_host_bytes())
    release_team()  # the model may be used by another thread than the one that has loaded it
    return model, tokenizer


def load_plain_model(
    model_path: str | Path | None = None,
    gguf_path: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
) -> tuple[Any, Any]:
    """Load the same model without operators, every weight dequantised: the oracle of tests.

    Args:
        model_path, gguf_path, dtype, progress: as in `load_model`; `dtype` is bfloat16 by default.

    Returns:
        (model, tokenizer) as transformers has them.

    Raises:
        HybriMoEError: as `load_model`.
    """
    store = open_weights(model_path, gguf_path)
    model_path = model_path or store.directory
    config = model_config(model_path, store)
    tokenizer = load_tokenizer(model_path, store, config)
    model = meta_model(config, dtype_of(dtype))
    check_complete(model, store, config)
    set_generation(model, tokenizer, store.metadata, model_path, config.vocab_size)
    load_dense(model, store, config, None, progress=progress)
    return model, tokenizer


def check_memory(prediction: Prediction) -> None:
    """Refuse a model that does not fit, and say once what fits badly.

    Raises:
        BackendError, BudgetError: as `Prediction.check`.
    """
    prediction.check()
    warnings = prediction.warnings()
    if warnings:
        log.warning("memory: %s", "; ".join(warnings))


def load_dense(
    model: Any, store: GGUFStore, config: Any, injection: Injection | None, *, progress: bool = True
) -> None:
    """Fill every parameter that is still on the meta device, rebuild computed buffers, tie weights.

    Raises:
        WeightsError: a tensor is missing or does not fit.
        BudgetError: the dense weights do not fit into memory.

    Mutates: `model`.
    """
    wanted = missing_parameters(model, config)
    needed = sum(value.numel() * value.element_size() for value in wanted.values())
    check_host(needed, "the dense weights")
    source = source_of(store, config, names_of(config.model_type))
    # Checked as a whole before the first is read, so that a wrong file fails at once.
    for name in wanted:
        for part in source.parts(name):
            store.info(part)
    loaded = _read(wanted, source, dense_device(model), progress)
    model.load_state_dict(loaded, strict=False, assign=True)
    rebuild_buffers(model)
    if tied(model, config):
        model.tie_weights()
    _place(model, injection)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, value in tensors if value.is_meta]
    if left:
        raise WeightsError(
            f"{store.paths[0]}: nothing in the file for {', '.join(left[:5])} ({len(left)} in all)"
        )


def _read(
    wanted: Mapping[str, torch.Tensor], source: AnySource, device: str, progress: bool
) -> dict[str, torch.Tensor]:
    """The parameters, dequantised on the device. Raises: BudgetError: no room there."""
    loaded = {}
    bar = tqdm(
        wanted.items(), desc="loading weights", disable=not progress, leave=False, unit="tensor"
    )
    try:
        for name, value in bar:
            loaded[name] = source.load(name, value.shape, value.dtype, device)
    except torch.cuda.OutOfMemoryError as error:
        raise BudgetError(f"the dense weights do not fit on the accelerator: {error}") from error
    return loaded


def _place(model: nn.Module, injection: Injection | None) -> None:
    """Move dense parts to the accelerator, if the operators compute on one.

    `default` rules may say otherwise for single modules.
    """
    device = dense_device(model)
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
    places = experts_on_several(model)
    if not places or cuda_refusal() is not None:
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
