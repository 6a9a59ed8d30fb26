"""Connects kTransformers' loader, routers and operators to the engine."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from hybrimoe_plugin.engine.assemble import accelerator_kind
from hybrimoe_plugin.engine.cpu_choice import check_copies
from hybrimoe_plugin.engine.turns import take_turns
from hybrimoe_plugin.errors import BackendError, WeightsError
from hybrimoe_plugin.hosts.ktransformers.complete import check_complete
from hybrimoe_plugin.operators.bind import HybriMoE, bind, by_engine
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.routers import GateRouter
from hybrimoe_plugin.weights.gguf_store import GGUFStore

T = TypeVar("T")

NO_GRAPHS = (
    "HybriMoE plans every layer call anew, which a CUDA graph cannot hold: start with "
    "--use_cuda_graph False"
)
_ON_LOADER = "hybrimoe"
"""The attribute of kTransformers' loader that holds a model's `Shared`: the one object that all
operators are given.
"""


class Shared:
    """What the operators of one model share: the open weights, each other, their engine.

    Attributes:
        store: the loader's files, mapped once.
    """

    def __init__(self, store: GGUFStore) -> None:
        self.store = store
        self._operators: list[HybriMoEExperts] = []
        self._routers: dict[str, GateRouter] = {}
        self._handle: HybriMoE | None = None
        self._members: nn.ModuleList | None = None
        self._binding = threading.Lock()

    @classmethod
    def of(cls, loader: Any) -> Shared:
        """The one of this loader, made on first use.

        Raises:
            WeightsError: the loader's files are not one sound model, or hold what kTransformers
                would not read.
        """
        found = getattr(loader, _ON_LOADER, None)
        if not isinstance(found, cls):
            files = getattr(loader, "file_data_map", None)
            if not files:
                raise WeightsError(
                    f"{type(loader).__name__} has no GGUF files; HybriMoE reads experts from GGUF"
                )
            # Its loader takes every GGUF file below a directory; so must ours, to mean the same
            # model.
            found = cls(GGUFStore.open(sorted(files)))
            check_complete(found.store)
            setattr(loader, _ON_LOADER, found)
        return found

    def join(self, operator: HybriMoEExperts) -> None:
        self._operators.append(operator)

    def show_router(self, operator: HybriMoEExperts, gate: nn.Module, top_k: int) -> None:
        """Tell which router stands beside an operator."""
        self._routers[operator.key] = ClassicRouter(gate, top_k)

    def bind(self) -> HybriMoE | None:
        """Build the engine, once; None for a model without our operators.

        Raises:
            BackendError: the MoE block of an operator does not show its router.
            ConfigError, BudgetError: settings that cannot be met.
        """
        with self._binding:  # the first prompts may come on several threads
            if self._handle is None and self._operators:
                for members in by_engine(self._operators):
                    _check_copies(members)
                self._members = nn.ModuleList(
                    self._operators
                )  # the engine lives as long as this does
                self._handle = bind(self._members, routers=self._router, progress=False)
        return self._handle

    def in_turn(self, call: Callable[..., T], *args: Any) -> T:
        """Call while no other thread computes with this model; builds the engine if needed.

        Raises as `bind`, and BackendError once the model was closed.
        """
        handle = self._handle or self.bind()
        assert handle is not None, "an operator calls this"
        return handle.turns.run(call, *args)

    def _router(self, _model: nn.Module, operator: HybriMoEExperts) -> GateRouter:
        if operator.key not in self._routers:
            raise BackendError(
                f"{operator.key}: its MoE block does not show its router; let the rules replace "
                "the block by one of hybrimoe_plugin.hosts.ktransformers.blocks, as those in "
                "optimize_rules/ktransformers do"
            )
        return self._routers[operator.key]


def _check_copies(members: Sequence[HybriMoEExperts]) -> None:
    """As `check_copies`, for the experts of one engine."""
    first = members[0]
    kind, _ = accelerator_kind(first.settings, first.devices)
    layers = [operator.weights for operator in members if operator.weights is not None]
    check_copies(first.settings, layers, alone=kind == "none")


def attach(model: Any) -> HybriMoE | None:
    """Build the engine of a loaded model, and give it as `model.hybrimoe` too.

    For models that `optimize_and_load_gguf` has loaded.

    From then on threads that share the model take turns, one pass each. Without this call the
    engine is built at the first prompt, where the whole model is not at hand: then they take turns
    by MoE block. Raises as `Shared.bind`.
    """
    shared = getattr(model.gguf_loader, _ON_LOADER, None)
    handle = shared.bind() if isinstance(shared, Shared) else None
    if handle is not None and getattr(model, "hybrimoe", None) is not handle:
        take_turns(model, handle.turns)
        # What else the engine would end with, its operators hold themselves.
        weakref.finalize(model, handle.close)
    object.__setattr__(model, "hybrimoe", handle)
    return handle


class ClassicRouter(GateRouter):
    """The router of a kTransformers MoE block: a linear layer, or a `MoEGate`.

    Args:
        gate: `gate(hidden) -> logits [T, E]`, or `gate(hidden [1, T, H]) -> (ids [T, K], weights
            [T, K], ...)`.
        top_k: K, which a linear layer does not know.
    """

    def __init__(self, gate: nn.Module, top_k: int) -> None:
        super().__init__(gate)
        self._top_k = top_k

    def _keep(self, _module: nn.Module, args: Any, output: Any) -> None:
        # A MoEGate keeps its logits to itself; one small product gives them again.
        self._kept.append(output if isinstance(output, torch.Tensor) else self._compute(args[0]))

    def _compute(self, hidden: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.gate.weight  # type: ignore[assignment]
        return F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), weight.float())

    @property
    def predicts(self) -> bool:
        return True

    @torch.no_grad()
    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """Ids [T, K] that this router gives for hidden states [T, H]; hooks do not see it.

        Paper section 4.3.
        """
        found = self.gate.forward(hidden[None])
        if isinstance(found, torch.Tensor):
            return found.reshape(len(hidden), -1).topk(self._top_k, dim=-1).indices
        ids: torch.Tensor = found[0]
        return ids
