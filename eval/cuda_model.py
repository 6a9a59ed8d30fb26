"""Whole models on one NVIDIA GPU: how long do a prompt and a decode step take, with and without
CUDA graphs?

`python -m eval.throughput --device cuda` measures MoE layers alone; here attention on a growing
cache, norms, routers, dense parts and the head run too, as a user's rules inject them. Weights are
random in the models' shapes and types; each router computes, and then what it chose is exchanged
for given routing, on the device, so that graphs hold it. Predictions for a layer are the same from
every earlier layer. Without a CUDA device it is a dry run: small matrices, the emulated
accelerator, and its simulated time of the MoE layers alone.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from eval import report, synthetic
from eval.cuda import JOURNAL, NOT_JUDGED, PHASES, RATIOS, SYSTEMS
from eval.cuda_bench import CPU_THREADS, RECALL, limit_cpu
from eval.finished import Finished, Row, add_fresh
from eval.progress import Planned, Progress
from eval.shapes import MODELS, Model, Routing, layer_bytes, routing
from eval.systems import KTRANSFORMERS, OURS, System
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.decode.connect import connect_layers
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.device.memory import free_host_bytes
from hybrimoe_plugin.operators.routers import GateRouter
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.replay.trace import Call

log = logging.getLogger(__name__)

NO_GRAPHS = System("ours, no graphs", {"cuda_graphs": "off"})
PLAIN = System("ours, plain dense operators", {"dense": "plain"})
WHOLE = "whole models"
"""The question that a row of the journal belongs to."""
FILE_BYTES = 4e9
"""Experts' bytes in a model's file: a few layers tell what a layer costs."""
MOST_LAYERS = 12
WARM_UP = 6
"""Decode steps that do not count; graphs are captured and proved in the first two."""
PROMPT_REPEATS = 5
CELL_S = {True: 8.0, False: 15.0}
"""A guess at what a cell takes on a GPU, quick and full: loading, capturing, prompts, steps."""
DRY_CELL_S = {True: 0.6, False: 4.0}
"""What a cell of a dry run took on 2 cores."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "vocab_size": 256,
}
"""Shape of a dry run; layers, experts and top-k stay."""


class GivenGate(nn.Module):
    """A router that computes as it does and answers as told: ids and weights [1, K] in place, or
    [T, K] for prompts.
    """

    def __init__(self, gate: nn.Module, top_k: int) -> None:
        super().__init__()
        self.inner = gate
        device = next(gate.parameters()).device
        self.one = (
            torch.zeros(1, top_k, dtype=torch.int64, device=device),
            torch.ones(1, top_k, device=device),
        )
        self.many = self.one

    def tell(self, call: Call) -> None:
        ids, weights = torch.from_numpy(call.ids), torch.from_numpy(call.weights)
        if len(ids) > 1:
            self.many = ids.to(self.one[0].device), weights.to(self.one[0].device)
            return
        for place, value in zip(self.one, (ids, weights), strict=True):
            place.copy_(value)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, _ = self.inner(hidden)
        ids, given = self.one if logits.numel() == logits.shape[-1] else self.many
        return logits, given.to(weights.dtype), ids


class GivenRouter(GateRouter):
    """Predictions as told; the gate computes for its time's sake. Records hold no scores, so none
    are shown.
    """

    def __init__(self, gate: GivenGate) -> None:
        super().__init__(gate)
        self.foreseen = gate.one[0].clone(), gate.one[0]

    def tell(self, ids: torch.Tensor) -> None:
        if len(ids) == 1:
            self.foreseen[0].copy_(ids)
        else:
            self.foreseen = self.foreseen[0], ids.to(self.foreseen[0].device)

    def scores(self) -> torch.Tensor | None:
        return None

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        super().predict(hidden)
        return self.foreseen[hidden.shape[0] > 1]


class Subject:
    """One system on one model, loaded.

    Args:
        path: the model's file.
        given: the routing that will be given.
    """

    def __init__(self, path: Path, system: System, ratio: float, given: Routing, dry: bool) -> None:
        from hybrimoe_plugin import load_model
        from hybrimoe_plugin.hosts.transformers.load import experts_operators

        here: dict[str, Any] = {
            "accelerator": "cuda",
            "cpu_threads": min(CPU_THREADS, len(os.sched_getaffinity(0))) - 1,
        }
        if dry:
            here = {"accelerator": "emulated", "linears": "plain", "cpu_backend": "torch"}
            here |= {"dtype": "float32", "profile": "a6000-deepseek-v2-lite"}
        self.dry = dry
        self.model, _ = load_model(
            None, path, progress=False, cache_ratio=ratio, **{**here, **system.settings}
        )
        (self.engine,) = self.model.hybrimoe.engines
        self._keyword = cache_name(self.model)
        self.gates = []
        for place, operator in enumerate(experts_operators(self.model)):
            block: Any = self.model.get_submodule(operator.key.rpartition(".")[0])
            old: Any = self.engine.routers[place]
            old.detach()
            block.gate = GivenGate(block.gate, given.header.top_k)
            self.gates.append(block.gate)
            self.engine.routers[place] = GivenRouter(block.gate)
        connect_layers(self.model, self.model.hybrimoe.turns)
        self._place(Settings.of(system.settings), given)

    def _place(self, settings: Settings, given: Routing) -> None:
        """Begin with the experts that are most popular elsewhere, as every system in `eval.cuda`
        does.
        """
        controller, layers = self.engine.controller, len(self.gates)
        experts, top_k = self.engine.layers[0].spec.experts, given.header.top_k
        controller.cache = make_cache(
            settings.cache, layers, experts, top_k, settings, given.popularity[:layers]
        )
        pool = controller.pool
        controller.pool = SlotPool(pool.quotas, pool.staging, pool.shared)
        for move in controller.warm_start():
            self.engine.accelerator.onload(move.slot, self.engine.layers[move.layer], move.expert)

    def run(self, calls: Sequence[Call], cache: Any) -> tuple[float, Any]:
        """(us, cache) of one pass."""
        for call in calls[: len(self.gates)]:
            self.gates[call.layer].tell(call)
            if call.predicted and call.layer + 1 < len(self.gates):
                self.engine.routers[call.layer + 1].tell(torch.from_numpy(call.predicted[0]))
        ids = torch.randint(3, 250, (1, len(calls[0].ids)), device=self.model.device)
        started, simulated = self._now()
        out = self.model(ids, **{self._keyword: cache}, use_cache=True, logits_to_keep=1)
        ended, later = self._now()
        return (later - simulated if self.dry else ended - started), cache_in(out)

    def _now(self) -> tuple[float, float]:
        self.engine.accelerator.synchronize()
        return time.perf_counter_ns() / 1e3, self.engine.clock.now_us()

    @property
    def captured(self) -> int:
        """Layers that run as graphs."""
        return sum(
            module.captured for module in self.model.modules() if isinstance(module, GraphedLayer)
        )

    def close(self) -> None:
        self.model.hybrimoe.restore()


class Timing(NamedTuple):
    prefill_us: list[float]
    decode_us: list[float]
    hit_rate: float
    captured: int


@torch.no_grad()
def measure(subject: Subject, given: Routing) -> Timing:
    """Prompts, each into an empty cache, then decode behind the last."""
    prefill, decode, cache = [], [], None
    for turn in range(PROMPT_REPEATS + 1):
        us, cache = subject.run(given.prompts[turn % len(given.prompts)], None)
        prefill.append(us)
    before = subject.engine.controller.counters.snapshot()
    for number, calls in enumerate(given.decode):
        us, cache = subject.run(calls, cache)
        if number == WARM_UP - 1:
            before = subject.engine.controller.counters.snapshot()
        decode.append(us)
    counts = subject.engine.controller.counters.since(before)
    return Timing(prefill[1:], decode[WARM_UP:], counts.hit_rate, subject.captured)


def write(
    model: Model, given: Routing, layers: int, path: Path, dry: bool, vocabulary: int | None = None
) -> None:
    """A file of the model's shape with as many MoE layers, whose tokens take as many experts as the
    routing's.

    Args:
        vocabulary: rows of embedding and head instead of the model's own; a dry run has few anyway.
    """
    dense = synthetic.SHAPES[model.shape][1].get("first_k_dense_replace", 0)
    made = synthetic.config(model.shape, layers + dense)
    made.num_experts_per_tok = given.header.top_k
    if hasattr(made, "moe_intermediate_size"):
        made.moe_intermediate_size = model.intermediate
    if vocabulary is not None:
        made.vocab_size = vocabulary
    for name, value in SMALL.items() if dry else ():
        if getattr(made, name, None) is not None:
            setattr(made, name, value)

    def choose(name: str, shape: tuple[int, ...]) -> str:
        if dry:
            return "Q8_0" if shape[-1] % 32 == 0 else "F32"
        return synthetic.choose_type(name, shape, "Q4_K_M", made.num_hidden_layers)

    synthetic.write(path, made, choose)


def cells(ratios: Sequence[float]) -> list[tuple[float, System]]:
    """Cache size and system of each cell of a model."""
    return [(ratio, system) for ratio in ratios for system in (*SYSTEMS, NO_GRAPHS, PLAIN)]


def planned(
    models: Sequence[Model], ratios: Sequence[float], dry: bool, quick: bool, found: Finished
) -> tuple[Planned, int]:
    """(cells still to be measured, how many an earlier run measured)."""
    keys = [_key(model, ratio, system) for model in models for ratio, system in cells(ratios)]
    left = sum(found.phases(*PHASES, **key) is None for key in keys)
    return Planned(left, (DRY_CELL_S if dry else CELL_S)[quick]), len(keys) - left


def model_rows(
    model: Model,
    ratios: Sequence[float],
    dry: bool,
    quick: bool,
    found: Finished,
    progress: Progress,
) -> Iterator[Row]:
    """One row for each cell and phase of a model, taken from the journal or measured and saved one
    by one.
    """
    given = routing(model, *((32, 16) if quick else (128, 64)), look_ahead=3, recall=RECALL)
    layers = _layers(model, given, dry)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for ratio, system in cells(ratios):
            # Layers are as many as fit, which may have changed since.
            key = {**_key(model, ratio, system), "moe_layers": layers}
            kept = found.phases(*PHASES, **key)
            if kept is None:
                if not path.exists():
                    write(model, given, layers, path, dry)
                subject = Subject(path, system, ratio, given, dry)
                try:
                    timing = measure(subject, given)
                finally:
                    subject.close()
                kept = [found.add({**key, **row}) for row in _rows(model, given, timing, dry)]
                progress.done(WHOLE)
            yield from kept


def _key(model: Model, ratio: float, system: System) -> Row:
    return {"question": WHOLE, "model": model.name, "cache": ratio, "method": system.name}


def _layers(model: Model, given: Routing, dry: bool) -> int:
    """MoE layers of a model's file."""
    size = min(FILE_BYTES, 0.5 * free_host_bytes()) / layer_bytes(model, given.header.experts)
    return min(len(given.prompts[0]), 2 if dry else max(2, min(MOST_LAYERS, int(size))))


def _rows(model: Model, given: Routing, timing: Timing, dry: bool) -> Iterator[Row]:
    """What was measured in each phase."""
    for phase, us in zip(PHASES, (timing.prefill_us, timing.decode_us), strict=True):
        low, middle, high = statistics.quantiles(us, n=10)[1::3]
        yield {
            "routing": f"{given.header.source} ({model.note})",
            "phase": phase,
            "tokens": len(given.prompts[0][0].ids) if phase == "prefill" else 1,
            "p20_ms": low / 1e3,
            "p50_ms": statistics.median(us) / 1e3,
            "p80_ms": high / 1e3,
            "repetitions": len(us),
            "hit_rate": timing.hit_rate,
            "layers_captured": timing.captured,
            "emulated": dry,
        }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Geometric means over models and cache sizes, of medians."""
    times = {
        (row["model"], row["cache"], row["phase"], row["method"]): row["p50_ms"] for row in rows
    }

    def gain(other: System, phase: str) -> float:
        return statistics.geometric_mean(
            time / times[(*cell, phase, OURS.name)]
            for (*cell, kind, method), time in times.items()
            if kind == phase and method == other.name
        )

    return {
        "decode_speedup_geomean": gain(KTRANSFORMERS, "decode"),
        "prefill_speedup_geomean": gain(KTRANSFORMERS, "prefill"),
        "decode_graphs_speedup": gain(NO_GRAPHS, "decode"),
        "decode_dense_operators_speedup": gain(PLAIN, "decode"),
    }


def measure_all(
    models: Sequence[Model],
    ratios: Sequence[float],
    dry: bool,
    args: Namespace,
    found: Finished,
    progress: Progress,
) -> dict[str, Any]:
    """Every model, shown and saved in `args.out`; gives what the JSON line says. A quick run does
    not judge.
    """
    rows = [
        row
        for model in models
        for row in model_rows(model, ratios, dry, args.quick, found, progress)
    ]
    names = (
        "model",
        "cache",
        "method",
        "phase",
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "hit_rate",
        "layers_captured",
    )
    title = "Whole models: times of the MoE layers, emulated" if dry else "Whole models, measured"
    report.show(title, [{name: row[name] for name in names} for row in rows])
    report.save_csv(args.out / "cuda_model.csv", rows)
    result: dict[str, Any] = summary(rows)
    if dry:  # the emulated accelerator knows of MoE layers alone
        result |= {"decode_graphs_speedup": None, "decode_dense_operators_speedup": None}
    return dict.fromkeys(result) if args.quick else result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives what the JSON line says."""
    logging.basicConfig(level=logging.WARNING)
    parser = report.parser(__doc__ or "")
    add_fresh(parser)
    args = parser.parse_args(arguments)
    reason = cuda_refusal()
    dry = reason is not None
    if dry:
        log.warning("dry run on the emulated accelerator, no number is a measurement: %s", reason)
        torch.set_num_threads(1)
    else:
        limit_cpu()
    ratios = (0.5,) if args.quick else RATIOS
    found = Finished(args.out / JOURNAL, args.quick, args.fresh)
    left, taken = planned(MODELS, ratios, dry, args.quick, found)
    with Progress({WHOLE: left}, taken) as progress:
        result = measure_all(MODELS, ratios, dry, args, found, progress)
    result |= {"judged": not args.quick, "emulated": dry}
    if args.quick:
        print(NOT_JUDGED)
    report.finish(result)
    return result


if __name__ == "__main__":
    main()
