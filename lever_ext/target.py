"""A target model whose weights live on flash: a normal `transformers` model with injected
operators.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.config import Settings, parse_bytes
from hybrimoe_plugin.engine.turns import Turns, take_turns
from hybrimoe_plugin.errors import ConfigError, FlashError, SpeculationError
from hybrimoe_plugin.hosts.transformers.as_usual import Guard
from hybrimoe_plugin.hosts.transformers.directory import config_of
from hybrimoe_plugin.hosts.transformers.generation import set_generation
from hybrimoe_plugin.injection.inject import Injection, inject
from hybrimoe_plugin.injection.match import plan_injection
from hybrimoe_plugin.injection.rules import load_rules
from hybrimoe_plugin.operators.routers import GateRouter
from hybrimoe_plugin.policy.cache import make_cache
from lever_ext.early_exit.gate import ExitGate
from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings
from lever_ext.flash.accelerator import Accelerator, make_accelerator
from lever_ext.flash.budget import Residency, plan_residency
from lever_ext.flash.experts import FlashExpertCache
from lever_ext.flash.pack import FlashPack, Tensors
from lever_ext.flash.reader import Throttle
from lever_ext.flash.split import Place, Split
from lever_ext.flash.split_stream import SplitStream
from lever_ext.flash.stream import LayerStream
from lever_ext.operators.carry import Carrier
from lever_ext.operators.decoder import FlashDecoderLayer
from lever_ext.operators.experts import FlashExperts
from lever_ext.operators.linear import with_row_linears
from lever_ext.placing import Placement, move_head, place_layers, split_stream

logger = logging.getLogger(__name__)

CLOSED = "this target was closed: load it again with load_target"

RULES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen_moe",
    "qwen3_moe": "qwen_moe",
}
"""Model type -> packaged rules in `optimize_rules/lever`."""


@dataclass
class FlashTarget:
    """A loaded target and what serves it."""

    model: Any
    """The `transformers` model, ready for `generate`."""
    pack: FlashPack
    residency: Residency
    stream: LayerStream | SplitStream
    experts: FlashExpertCache | None
    """None for a dense target."""
    injection: Injection
    gate: ExitGate | None = None
    accelerator: Accelerator | None = None
    """Computes a part of the layers; None where all compute on the CPU."""
    split: Split | None = None
    """Which part, and what is expected of it."""
    carrier: Carrier | None = None
    turns: Turns = field(default_factory=Turns)
    """Of the threads that use the model: a forward pass each, or a cycle of speculation."""

    def set_gate(self, gate: ExitGate | None) -> None:
        """Switch early-exit pruning on, or off with None. Mutates."""
        with self.turns.lock:
            self.gate = gate
            for done in self.injection.replaced:
                if isinstance(done.operator, FlashDecoderLayer):
                    done.operator.bind(self.stream, gate, self.carrier)

    def load_gate(self, predictor: str | Path, settings: PruneSettings | None = None) -> None:
        """Switch early-exit pruning on with a predictor that `hybrimoe lever-train` made for this
        pack. Mutates.

        Raises:
            SpeculationError: the file is missing, damaged, or of another model.
        """
        config = self.model.config
        shape = (config.vocab_size, config.hidden_size)
        found = ExitPredictor.load(
            predictor, self.pack.index.fingerprint, shape, config.num_hidden_layers
        )
        self.set_gate(ExitGate(found, settings or PruneSettings()))

    def stop_as(self, tokenizer: Any) -> None:
        """Let `generate` draw, end and pad as the tokenizer and the pack's generation config say.
        Mutates.

        Raises:
            ConfigError: a value in the pack's generation_config.json is out of range.
            WeightsError: the file cannot be read.
        """
        set_generation(
            self.model, tokenizer, {}, self.pack.path.parent, self.model.config.vocab_size
        )

    def close(self) -> None:
        """Stop reading, once no thread computes; a forward pass after it raises BackendError."""
        with self.turns.lock:
            self.turns.end(CLOSED)
            self.pack.close()
            self.stream.reset(0)
            if self.accelerator is not None:
                self.accelerator.close()

    def recover(self) -> None:
        """Clear what a turn has left that did not come to its end, wherever it was cut off.
        Mutates.
        """
        self.pack.reader.settle()  # first: what follows gives buffers to the next reads
        self.stream.reset(0)
        for done in self.injection.replaced:
            if isinstance(done.operator, FlashDecoderLayer | FlashExperts):
                done.operator.recover()


def load_target(
    pack: str | Path,
    *,
    dram_budget: int | str | None = None,
    rules: str | Path | None = None,
    cache: str = "mrs",
    threads: int = 4,
    throttle: Throttle | None = None,
    direct: bool = True,
    trust_rules: bool = False,
    device: str = "cpu",
    vram_budget: int | str | None = None,
    places: Sequence[Place] | None = None,
) -> FlashTarget:
    """Build the model on the meta device, inject the flash operators, read what stays resident.

    Args:
        pack: a flash pack or the directory that holds one.
        dram_budget: bytes or text such as 1GiB for all weights and buffers in DRAM; None for no
            limit.
        rules: a rules file; the packaged one of the model's family by default.
        cache: policy that keeps experts in DRAM.
        threads: direct reads in flight.
        throttle: slow reads down to a stated bandwidth.
        device: cpu, or the accelerator that computes those parts which are measured to be quicker
            there: cuda, cuda:N, or emulated (for tests).
        vram_budget: of its memory for weights, bytes or text; by default what is free, less a
            tenth.
        places: of all layers, instead of measuring.

    Raises:
        FlashError: the pack is damaged, foreign or unreadable.
        BudgetError: the budget is below what one pass needs.
        RulesError: the rules do not fit the model.
        BackendError: the device cannot be used here.
    """
    accelerator = make_accelerator(device, vram_budget)
    budget = None if dram_budget is None else parse_bytes(dram_budget, "dram_budget")
    opened = FlashPack.open(pack, threads=threads, throttle=throttle, direct=direct)
    try:
        plan_residency(opened, budget)  # refused before anything is read
        plain = meta_model(dict(opened.config), _dtype(opened))
        _check_complete(plain, opened)
        model = with_row_linears(plain)
        plan = plan_injection(
            model, load_rules(rules or packaged_rules(model.config)), trust_rules=trust_rules
        )
        injection = inject(model, plan, opened, model.config)
        target = _serve(model, opened, injection, _Wanted(budget, cache, accelerator, places))
    except BaseException:
        if accelerator is not None:
            accelerator.close()
        opened.close()
        raise
    target.stream.start()
    return target


def _check_complete(model: nn.Module, pack: FlashPack) -> None:
    """Raise FlashError where the pack's tensors are not all parameters of the model, and those
    alone.
    """
    held = {tensor.name: None for block in pack.index.blocks for tensor in block.tensors}
    wanted = dict.fromkeys(name for name, _ in model.named_parameters())
    missing = [name for name in wanted if name not in held]
    unused = [name for name in held if name not in wanted]
    if missing or unused:
        what = (
            f"lacks {missing[0]!r}"
            if missing
            else f"holds {unused[0]!r}, which the model has no place for"
        )
        raise FlashError(
            f"{pack.path}: the pack {what} ({len(missing) + len(unused)} such tensors); it was "
            f"made from another model"
        )


@dataclass(frozen=True)
class _Wanted:
    """How a target shall be served."""

    budget: int | None
    cache: str
    accelerator: Accelerator | None
    places: Sequence[Place] | None


def _serve(model: Any, pack: FlashPack, injection: Injection, wanted: _Wanted) -> FlashTarget:
    """Read the resident parts and connect the operators."""
    for done in injection.replaced:
        done.operator.load()  # type: ignore[operator]
    for block in pack.blocks("resident"):
        assign_tensors(model, pack.load(block))
    model.tie_weights()
    rebuild_buffers(model)
    layers = [
        done.operator for done in injection.replaced if isinstance(done.operator, FlashDecoderLayer)
    ]
    placement = place_layers(model, pack, wanted.budget, layers, wanted.accelerator, wanted.places)
    accelerator = wanted.accelerator if placement.split is not None else None
    residency, elsewhere = (
        placement.residency,
        placement.split.stays if placement.split is not None else 0,
    )
    stream, carrier = split_stream(
        LayerStream(pack, residency.layers, residency.ring, elsewhere), placement, accelerator
    )
    for operator in (one for one in layers if placement.keeps_router(one.index)):
        # From the first pass on: the layer before asks its router what to read ahead.
        operator.install(*stream.acquire(operator.index))
    experts = expert_cache(pack, residency, model.config, wanted.cache)
    _bind_experts(injection, experts, model, placement, accelerator, pack)
    left = [name for name, p in model.named_parameters() if p.is_meta and ".layer." not in name]
    if left:
        raise FlashError(
            f"{pack.path}: nothing in the pack or the rules provides {left[0]}; check the rules"
        )
    move_head(model, placement, accelerator)
    target = FlashTarget(
        model.eval(),
        pack,
        residency,
        stream,
        experts,
        injection,
        None,
        accelerator,
        placement.split,
        carrier,
    )
    target.set_gate(None)
    target.turns.clean_up.append(target.recover)
    Guard(model, "the model that the pack was made from")
    take_turns(model, target.turns)
    return target


def _bind_experts(
    injection: Injection,
    experts: FlashExpertCache | None,
    model: Any,
    placement: Placement,
    accelerator: Accelerator | None,
    pack: FlashPack,
) -> None:
    """Give every experts operator the cache, its layer's router and the next one's where that is
    resident.
    """
    operators = [
        done.operator for done in injection.replaced if isinstance(done.operator, FlashExperts)
    ]
    if operators and experts is None:
        raise FlashError(
            f"{pack.path}: the pack holds no routed experts; it was made from another model"
        )
    gates = [
        getattr(model.get_submodule(operator.key.rpartition(".")[0]), "gate", None)
        for operator in operators
    ]
    routers = [None if gate is None else GateRouter(gate) for gate in gates]
    side = placement.experts_on(accelerator)
    for index, operator in enumerate(operators):
        following = index + 1 if index + 1 < len(operators) else -1
        resident = following > 0 and placement.keeps_router(operators[following].layer_index)
        assert experts is not None
        operator.bind(experts, routers[index], routers[following] if resident else None, side)
    if (
        side is not None
        and accelerator is not None
        and accelerator.pins is not None
        and experts is not None
    ):
        accelerator.pins.add(experts.buffers)


def expert_cache(
    pack: FlashPack, residency: Residency, config: Any, cache: str = "mrs"
) -> FlashExpertCache | None:
    """An empty expert cache of the size that a residency gives it; None for a dense target."""
    blocks = pack.blocks("expert")
    if not blocks:
        return None
    count = len({block.expert for block in blocks})
    layers = len({block.layer for block in blocks})
    policy = make_cache(cache, layers, count, config.num_experts_per_tok, Settings(cache=cache))
    return FlashExpertCache(
        pack, residency.expert_slots, max(2, residency.staging), residency.ahead, policy
    )


def meta_model(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A causal LM on the meta device from the contents of a `config.json`.

    Raises:
        SpeculationError: `transformers` knows no such model.
        ConfigError: the config names code or kernels that would have to be run or fetched.
    """
    from transformers import AutoModelForCausalLM

    try:
        parsed = config_of(config, "the pack's config")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(parsed, dtype=dtype, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise SpeculationError(
            f"cannot build a causal LM from the pack's config: {error}"
        ) from None


def packaged_rules(config: Any) -> Path:
    """The rules file of a model family.

    Raises:
        SpeculationError: no rules for it.
    """
    if config.model_type not in RULES:
        known = ", ".join(sorted(RULES))
        raise SpeculationError(
            f"no flash rules for model type {config.model_type!r}, only for {known}; give a rules "
            f"file"
        )
    return (
        Path(str(resources.files("optimize_rules"))) / "lever" / f"{RULES[config.model_type]}.yaml"
    )


def _dtype(pack: FlashPack) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, pack.index.blocks[0].tensors[0].dtype)
    return dtype


def assign_tensors(model: nn.Module, tensors: Tensors) -> None:
    """Set parameters by name, whatever device they were on. Mutates.

    Raises:
        FlashError: the model has no such parameter, or of another shape.
    """
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise FlashError(
                f"the model has no {name!r}; the pack was made from another one"
            ) from None
        if module._parameters.get(leaf) is None or module._parameters[leaf].shape != tensor.shape:  # type: ignore[union-attr]
            raise FlashError(f"{name!r} does not fit the model; the pack was made from another one")
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def rebuild_buffers(model: Any) -> None:
    """Make the modules anew whose buffers no file holds, such as rotary frequencies. Mutates."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            path, _, leaf = name.rpartition(".")
            with torch.device("cpu"):
                model.get_submodule(path).register_module(leaf, type(module)(config=model.config))
