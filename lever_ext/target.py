"""A target whose weights live on flash: a normal `transformers` model with injected operators."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.config import Settings, parse_bytes
from hybrimoe_plugin.engine.turns import Turns, take_turns
from hybrimoe_plugin.errors import BackendError, FlashError
from hybrimoe_plugin.families.packaged_rules import flash_rules
from hybrimoe_plugin.hosts.transformers.as_usual import Guard
from hybrimoe_plugin.hosts.transformers.generation import set_generation
from hybrimoe_plugin.hosts.transformers.skeleton import (
    dtype_of,
    meta_model_of,
    rebuild_buffers,
)
from hybrimoe_plugin.injection.inject import Injection, inject
from hybrimoe_plugin.injection.match import plan_injection
from hybrimoe_plugin.injection.rules import load_rules
from hybrimoe_plugin.operators.proof.proofs import Proofs
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.weights.layer_weights import chosen_experts
from lever_ext.early_exit.gate import ExitGate
from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings
from lever_ext.flash.dram_plan import LEAST_STAGING, DramPlan, plan_dram
from lever_ext.flash.experts import FlashExpertCache
from lever_ext.flash.pack import FlashPack, Tensors
from lever_ext.flash.plan import packed_tensors
from lever_ext.flash.reader import Throttle
from lever_ext.flash.stream import LayerStream
from lever_ext.operators.decoder import FlashDecoderLayer
from lever_ext.operators.experts import FlashExperts
from lever_ext.operators.linear import with_row_linears
from lever_ext.operators.transfer import LayerTransfer
from lever_ext.placement.bind import bind_experts
from lever_ext.placement.choose import move_head, place_layers, split_stream
from lever_ext.placement.device import TargetDevice, make_device
from lever_ext.placement.split import Place, Split
from lever_ext.placement.split_stream import SplitStream

CLOSED = "this target was closed: load it again with load_target"


@dataclass
class FlashTarget:
    """A loaded target and what serves it."""

    model: Any
    """The `transformers` model, ready for `generate`."""
    pack: FlashPack
    residency: DramPlan
    """Which weights stay in DRAM."""
    stream: LayerStream | SplitStream
    experts: FlashExpertCache | None
    """None for a dense target."""
    injection: Injection
    gate: ExitGate | None = None
    accelerator: TargetDevice | None = None
    """Computes a part of the layers; None where all compute on the CPU."""
    split: Split | None = None
    """Which part, and what is expected of it."""
    transfer: LayerTransfer | None = None
    """Takes inputs to the device that computes a layer; None where all compute on the CPU."""
    turns: Turns = field(default_factory=Turns)
    """One thread uses the model at a time: for a forward pass, or for a cycle of speculation."""

    def set_gate(self, gate: ExitGate | None) -> None:
        """Switch early-exit pruning on, or off with None. Mutates."""
        with self.turns.lock:
            self.gate = gate
            for done in self.injection.replaced:
                if isinstance(done.operator, FlashDecoderLayer):
                    done.operator.bind(self.stream, gate, self.transfer)

    def load_gate(self, predictor: str | Path, settings: PruneSettings | None = None) -> None:
        """Switch early-exit pruning on. Mutates.

        Args:
            predictor: file that `hybrimoe lever_train` made for this pack.
            settings: of the pruning.

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
        """Let `generate` draw, end and pad as tokenizer and generation config say. Mutates.

        The generation config is the pack's.

        Raises:
            ConfigError: a value in the pack's generation_config.json is out of range.
            WeightsError: the file cannot be read.
        """
        set_generation(
            self.model, tokenizer, {}, self.pack.path.parent, self.model.config.vocab_size
        )

    def close(self) -> None:
        """Stop reading, once no thread computes; later forward passes raise BackendError."""
        with self.turns.lock:
            self.turns.end(CLOSED)
            self.pack.close()
            self.stream.reset(0)
            if self.accelerator is not None:
                self.accelerator.close()

    def recover(self) -> None:
        """Clear what a pass that was cut off anywhere has left. Mutates."""
        # First: what follows gives buffers to the next reads.
        self.pack.reader.settle()
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
        trust_rules: let the rules import classes from any package.
        device: cpu, or the accelerator that computes those parts which are measured to be faster
            there: cuda, cuda:N, or emulated (for tests).
        vram_budget: of its memory for weights, bytes or text; by default what is free, less a
            tenth.
        places: where each layer computes, instead of measuring.

    Raises:
        FlashError: the pack is damaged, foreign or unreadable.
        BudgetError: the budget is below what one pass needs.
        WeightsError: transformers cannot build a model from the pack's config.
        RulesError: the rules do not fit the model, or there are none for its family.
        BackendError: the device cannot be used here.
    """
    accelerator = make_device(device, vram_budget)
    budget = None if dram_budget is None else parse_bytes(dram_budget, "dram_budget")
    opened = FlashPack.open(pack, threads=threads, throttle=throttle, direct=direct)
    try:
        plan_dram(opened, budget)  # refused before anything is read
        dtype = dtype_of(opened.index.dtype)
        plain = meta_model_of(opened.config, dtype, "the pack's config")
        opened.check_holds(packed_tensors(plain))
        proofs = Proofs(plain, plain.config)
        plan = plan_injection(
            plain,
            load_rules(rules or flash_rules(plain.config)),
            trust_rules=trust_rules,
            declines=proofs.declines,
        )
        proofs.report()
        model = with_row_linears(plain)
        injection = inject(model, plan, opened, model.config)
        target = _serve(model, opened, injection, _Options(budget, cache, accelerator, places))
    except BaseException:
        if accelerator is not None:
            accelerator.close()
        opened.close()
        raise
    target.stream.start()
    return target


@dataclass(frozen=True)
class _Options:
    """How a target shall be served; see `load_target`."""

    budget: int | None
    cache: str
    accelerator: TargetDevice | None
    places: Sequence[Place] | None


def _serve(model: Any, pack: FlashPack, injection: Injection, options: _Options) -> FlashTarget:
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
    placement = place_layers(
        model, pack, options.budget, layers, options.accelerator, options.places
    )
    accelerator = options.accelerator if placement.split is not None else None
    plan = placement.dram_plan
    stream, transfer = split_stream(
        LayerStream(pack, plan.layers, plan.ring, placement.stays), placement, accelerator
    )
    for operator in layers:
        if placement.keeps_router(operator.index):
            # From the first pass on: the layer before asks its router what to prefetch.
            operator.install(*stream.acquire(operator.index))
    experts = expert_cache(pack, plan, model.config, options.cache)
    bind_experts(injection, experts, model, placement, accelerator, pack)
    left = [
        name
        for name, value in packed_tensors(model).items()
        if value.is_meta and ".layer." not in name
    ]
    if left:
        raise FlashError(
            f"{pack.path}: nothing in the pack or the rules provides {left[0]}; check the rules"
        )
    move_head(model, placement, accelerator)
    target = FlashTarget(
        model=model.eval(),
        pack=pack,
        residency=plan,
        stream=stream,
        experts=experts,
        injection=injection,
        accelerator=accelerator,
        split=placement.split,
        transfer=transfer,
    )
    target.set_gate(None)
    if model.dtype == torch.float16:
        model.base_model.register_forward_hook(functools.partial(_check_range, pack.path))
    target.turns.clean_up.append(target.recover)
    Guard(model, "the model that the pack was made from")
    take_turns(model, target.turns)
    return target


def _check_range(path: Path, _model: Any, _inputs: Any, output: Any) -> None:
    """Raise BackendError where activations left the range of float16, which shows at the end."""
    if not output[0].isfinite().all():
        raise BackendError(
            f"{path}: this model's activations exceed the range of float16, so its answer would "
            f"be noise; pack the model again with --dtype bfloat16 --force"
        )


def expert_cache(
    pack: FlashPack, plan: DramPlan, config: Any, cache: str = "mrs"
) -> FlashExpertCache | None:
    """An empty expert cache of the planned size; None for a dense target.

    Args:
        pack: the target.
        plan: of its DRAM.
        config: of the model.
        cache: name of the policy.
    """
    blocks = pack.blocks("expert")
    if not blocks:
        return None
    policy = make_cache(
        cache,
        len({block.layer for block in blocks}),
        len({block.expert for block in blocks}),
        chosen_experts(config),
        Settings(cache=cache),
    )
    staging = max(LEAST_STAGING, plan.staging)
    return FlashExpertCache(pack, plan.expert_slots, staging, plan.prefetch, policy)


def assign_tensors(model: nn.Module, tensors: Tensors) -> None:
    """Set parameters and buffers by name, whatever device they were on. Mutates.

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
        held = module._buffers if leaf in module._buffers else module._parameters
        former = held.get(leaf)
        if former is None or former.shape != tensor.shape:
            raise FlashError(f"{name!r} does not fit the model; the pack was made from another one")
        if held is module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
