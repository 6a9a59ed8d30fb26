"""Which layers of a model are launched one behind the other."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from hybrimoe_plugin.decode.chain.proof import ProvenChain
from hybrimoe_plugin.decode.cuda_layer import CudaLayer
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.engine.turns import Turns
from hybrimoe_plugin.operators.experts import layer_of

T = TypeVar("T")


def connect_chains(
    model: nn.Module, layers: Sequence[GraphedLayer], turns: Turns
) -> Callable[[], None]:
    """Let captured layers that follow one another on a device run as a chain.

    The layer behind the last one is not the only one that may read an output: a pass may leave the
    last layers out, and a layer may be called by itself. So outputs are also made right before
    every module outside the layers, and at the end of each turn. The bookkeeping of the last layers
    comes at the end, when the device has all of the turn's work.

    Args:
        layers: of the model, whose calls are `CudaLayer`s, in its order.
        turns: of the model; what an interrupted turn leaves is cleared before the next one.

    Returns:
        Takes off what this leaves on the model.

    Mutates: `model`, `layers`, `turns`.
    """
    readers = outside(model, layers)
    handles = []
    # A layer that cannot join ends a run: those before it are proved by themselves.
    for run in runs_of(filter(_can_join, layers), _follows):
        first, last = run[0], run[-1]
        chain = ProvenChain(first.key if first is last else f"{first.key} to {last.key}")
        for layer in run:
            _cuda(layer).join(chain)
        for layer, follower in zip(run, run[1:], strict=False):
            # The layer's own dict: hooks are removed from it and added to it, and it stays.
            _cuda(layer).next_input_hooks = follower._forward_pre_hooks
        turns.clean_up.append(weakly(chain.recover))
        turns.complete.append(weakly(chain.settle))
        hook = before(weakly(chain.make_right))
        handles += [reader.register_forward_pre_hook(hook) for reader in readers]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def outside(model: nn.Module, layers: Sequence[GraphedLayer]) -> list[nn.Module]:
    """The model's modules that are no part of a layer and have none inside."""
    inside = {part for layer in layers for part in layer.modules()}
    parts = (part for part in model.modules() if part not in inside)
    return [part for part in parts if inside.isdisjoint(part.modules())]


def before(make_right: Callable[[], None]) -> Callable[..., None]:
    """A forward hook that calls this."""

    def hook(*_: Any) -> None:
        make_right()

    return hook


def runs_of(items: Iterable[T], follows: Callable[[T, T], bool]) -> Iterator[list[T]]:
    """Items in runs of which each follows the one before it."""
    run: list[T] = []
    for item in items:
        if run and not follows(run[-1], item):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def is_next(one: GraphedLayer, other: GraphedLayer) -> bool:
    """Whether a layer stands right behind another one in the model."""
    same_list = one.key.rpartition(".")[0] == other.key.rpartition(".")[0]
    return same_list and layer_of(other.key) == layer_of(one.key) + 1


def _can_join(layer: GraphedLayer) -> bool:
    return _cuda(layer).can_join


def _follows(one: GraphedLayer, other: GraphedLayer) -> bool:
    return is_next(one, other) and _cuda(one).state is _cuda(other).state


def _cuda(layer: GraphedLayer) -> CudaLayer:
    assert isinstance(layer.layer_call, CudaLayer)
    return layer.layer_call


def weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Call a method as long as its object lives.

    The engine's threads end with the model, so nothing that outlives it, as turns do, may hold it.
    """
    found = weakref.WeakMethod(method)

    def call() -> None:
        alive = found()
        if alive is not None:
            alive()

    return call
