"""A whole model whose decode steps are captured, on a device that computes nothing.

Every parameter lies on torch's `meta` device, and the experts in a file of holes. Rules, operators,
engine, slots, transfers, capture and its proofs are those of a model on a card.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from eval import loading
from eval.host_path.driver import Driver
from eval.host_path.edges import Addresses
from eval.host_path.free import DeviceClock, FreeCPU, FreeKernels, quick_addition
from eval.host_path.reads import Reads
from eval.models import synthetic
from hybrimoe_plugin.compute.attention.kept_entries import cut_entries
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name
from hybrimoe_plugin.compute.gpu import accelerator as accelerators
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.decode import connect
from hybrimoe_plugin.decode.capture import GraphBreak
from hybrimoe_plugin.decode.cuda_layer import CudaLayer
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.device.cuda_graphs import CudaCapture
from hybrimoe_plugin.engine import Engine, assemble
from hybrimoe_plugin.engine.turns import take_turns
from hybrimoe_plugin.hosts.transformers.preparation.places import experts_operators
from hybrimoe_plugin.hosts.transformers.preparation.prepare import open_weights, prepare
from hybrimoe_plugin.operators import bind as binding
from hybrimoe_plugin.policy.costs import CostCurve, CostModel

MODEL = "qwen3-30b-a3b"
PROMPT = 8
"""Tokens before the first step."""
PROVING = 4
"""Steps after which every layer must be captured."""
DEVICE = torch.device("meta")


def costs() -> CostModel:
    """A card behind a fast link: a Q4_K expert of this shape in 60 us; 90 us on the CPU."""
    return CostModel(
        cpu=CostCurve((1, 2, 64), (90.0, 100.0, 1000.0)),
        cpu_first_us=20.0,
        accelerator=CostCurve((1, 64), (3.0, 10.0)),
        accelerator_first_us=10.0,
        transfer_us=60.0,
        link_latency_us=8.0,
        between_layers_us=60.0,
    )


def make_free_accelerator(*_args: Any, **_kwargs: Any) -> SlotAccelerator:
    """The accelerator of a card, whatever was asked for."""
    made = accelerators.make_accelerator("cuda", DEVICE)
    assert made is not None
    return made


@dataclass
class Subject:
    """The loaded model and its fakes."""

    model: Any
    engine: Engine
    driver: Driver
    clock: DeviceClock
    cpu: FreeCPU
    kernels: FreeKernels
    layers: list[GraphedLayer]
    cache: Any
    """The KV cache of the one sequence, which holds `PROMPT` tokens and the proving steps."""
    held: int

    def step(self) -> Any:
        """One decode step of the whole model: logits [1, 1, V] on the device."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        with torch.no_grad():
            return _call(self.model, token, self.cache).logits

    def graph_break(self, layer: int) -> GraphBreak:
        """What a layer's first graph sends to the host."""
        call = self.layers[layer].layer_call
        assert isinstance(call, CudaLayer) and call._graphs is not None
        found = call._graphs.graph_break
        assert found is not None
        return found

    @property
    def chain(self) -> Any:
        """What launches the layers ahead."""
        call: Any = self.layers[0].layer_call
        return call.chain._chain

    def on_routed(self, layer: int, call: Callable[[], Any] | None) -> None:
        """What the device does at the end of a layer's first graph, as the host sees it."""
        calls = self.layers[layer].layer_call
        assert isinstance(calls, CudaLayer) and calls._graphs is not None
        graph: Any = calls._graphs.before
        graph.__self__.on_replay = call

    def rewind(self) -> None:
        """Forget the last steps, so that the buffers are never full."""
        for layer in self.cache.layers:
            cut_entries(layer, self.held)


@contextmanager
def subject(
    layers: int, experts: int, addresses: bool = False, down: str = "Q4_K", **settings: Any
) -> Iterator[Subject]:
    """Load it with all layers captured; the driver is in torch.cuda's place meanwhile.

    Args:
        addresses: give the device's tensors addresses, so that the order of uses can be checked.
        down: type of the experts' last matrix; Q6_K is rearranged on arrival.
        settings: of the engine.
    """
    driver = Driver()
    clock, cpu, kernels = DeviceClock(), FreeCPU(), FreeKernels(driver)
    profile = SimpleNamespace(costs=lambda spec: costs(), cpu=SimpleNamespace(threads=1))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = _model(Path(folder), layers, experts, down, settings)
        stack.enter_context(driver.installed())
        stack.enter_context(quick_addition())
        if addresses:
            stack.enter_context(Addresses().given())
        for place, name, value in (
            (accelerators, "cuda_refusal", lambda: None),
            (accelerators, "make_kernels", lambda *_args, **_kwargs: (kernels, None)),
            (assemble, "make_accelerator", make_free_accelerator),
            (assemble, "choose_cpu", lambda *_args, **_kwargs: ("free", profile)),
            (assemble, "cpu_for", lambda *_args, **_kwargs: cpu),
            (assemble, "SimulatedClock", lambda: clock),
            (connect, "capture_for", lambda device: CudaCapture(device)),
            # The engine is closed here, while there is a driver.
            (binding, "weakref", SimpleNamespace(finalize=lambda *_args: None)),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        model.hybrimoe = binding.bind(model, progress=False)
        connect.connect_layers(model, model.hybrimoe.turns)
        take_turns(model, model.hybrimoe.turns)
        engine = model.hybrimoe.engines[0]
        stack.callback(engine.close)
        found = [module for module in model.modules() if isinstance(module, GraphedLayer)]
        with Reads(driver):
            cache = _prove(model)
        assert all(layer.captured for layer in found), "not every layer was captured"
        held = cache.get_seq_length()
        yield Subject(model, engine, driver, clock, cpu, kernels, found, cache, held)


def _model(folder: Path, layers: int, experts: int, down: str, settings: dict[str, Any]) -> Any:
    """The model with its operators, as `load_model` makes it, but without a weight."""
    made = synthetic.config(MODEL, layers)
    made.num_experts = experts
    path = folder / "model.gguf"
    loading.write_zeros(path, made, stacked=True, down=down)
    chosen = {
        "accelerator": "emulated",
        "dense": "dequantised",
        "attention": "torch",
        "weights": "mapped",
        "cache_ratio": 0.5,
        **settings,
    }
    prepared = prepare(None, open_weights(None, path), None, settings=chosen)
    prepared.inject()
    model = prepared.model
    for operator in experts_operators(model):
        operator.load()
    return model


def _prove(model: Any) -> Any:
    """A prompt and the steps in which graphs are compared with their eager twin; the cache."""
    prompt = torch.zeros(1, PROMPT, dtype=torch.int64, device=DEVICE)
    token = prompt[:, :1]
    with torch.no_grad():
        cache = cache_in(model(prompt, use_cache=True))
        for _ in range(PROVING):
            _call(model, token, cache)
    return cache


def _call(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    return model(ids, use_cache=True, **{cache_name(model): cache})
