"""Which layers of a model are computed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from hybrimoe_plugin.compute.cpu.native.kernels import Kernels
from hybrimoe_plugin.decode.chain.connect import before, is_next, outside, runs_of, weakly
from hybrimoe_plugin.decode.foreign_hooks import has_own_forward, hooks_on_all
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.decode.on_cpu.lazy_chain import ChainLink, LazyChain
from hybrimoe_plugin.engine.turns import Turns

Linked = tuple[GraphedLayer, ChainLink]


def connect_lazily(
    model: nn.Module, kernels: Kernels, links: Sequence[Linked], turns: Turns
) -> Callable[[], None]:
    """Let layers that follow one another be computed together.

    A pass may leave the last layers out. So what waits is computed before every module outside the
    layers, and at the end of each turn. What an interrupted turn leaves is dropped before the next.

    Args:
        links: layers, in the model's order, with their links.

    Returns:
        Takes off what this leaves on the model.

    Mutates: `model`, `links`, `turns`.
    """
    layers = [module for module in model.modules() if isinstance(module, GraphedLayer)]
    readers = outside(model, layers)
    handles = []
    for run in runs_of(links, _follows):
        chain = LazyChain(kernels, _unchanged(model, [layer for layer, _ in run]))
        previous: ChainLink | None = None
        for number, (layer, link) in enumerate(run):
            # The layers' own dicts: hooks are removed from them and added to them, and they stay.
            watchers = [layer._forward_hooks]
            if number + 1 < len(run):
                watchers.append(run[number + 1][0]._forward_pre_hooks)
            link.join(chain, previous, watchers)
            link.step.make_graph()  # now, else the first token waits for it
            previous = link
        turns.complete.append(weakly(chain.settle))
        turns.clean_up.append(weakly(chain.forget))
        hook = before(weakly(chain.settle))
        handles += [reader.register_forward_pre_hook(hook) for reader in readers]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _unchanged(model: nn.Module, layers: Sequence[GraphedLayer]) -> Callable[[], bool]:
    """Whether a model still calls these layers, one after the other, and nothing around them."""
    path, _, first = layers[0].key.rpartition(".")
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    places = slice(int(first), int(first) + len(layers))

    def unchanged() -> bool:
        found = owner._modules.get(name)
        if not isinstance(found, nn.ModuleList) or list(found)[places] != layers:
            return False
        return all(map(has_own_forward, layers)) and not hooks_on_all()

    return unchanged


def _follows(one: Linked, other: Linked) -> bool:
    return is_next(one[0], other[0])
