"""One MoE layer in a chain: its row of the slot table, its marks, and its hits' bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hybrimoe_plugin.compute.backends import ResidentExperts
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.decode.capture import Experts, GraphBreak
from hybrimoe_plugin.decode.chain.slot_table import SlotTable
from hybrimoe_plugin.decode.chain.stamp import Stamp, StampedCopy
from hybrimoe_plugin.decode.decode_state import DecodeState
from hybrimoe_plugin.device.streams import PendingCopy
from hybrimoe_plugin.engine import Engine, Sent
from hybrimoe_plugin.operators.experts import HybriMoEExperts

NEWEST = 0.05
"""Weight of the newest call in a layer's share of calls without a miss."""

SURE = 0.5
"""Share of calls without a miss from which on the layers behind are launched before it is known.

To be right saves the time in which the device would wait for the host. To be wrong costs what was
launched behind, most of which runs while the host plans. In a model of both (`docs/LOG.md`) values
of 0.5 to 0.7 are alike, and higher ones slower.
"""


def link_of(experts: HybriMoEExperts, state: DecodeState, settings: Settings) -> LayerLink | None:
    """A layer's part of a chain; None where the host must plan each of its calls.

    Mutates: `state`, which keeps a table for each engine.
    """
    engine, position = experts.place
    accelerator = engine.accelerator
    if settings.host_path == "wait" or not isinstance(accelerator, ResidentExperts):
        return None
    if accelerator.device != state.device or accelerator.refusal(engine.layers[position]):
        return None
    if engine not in state.tables:
        state.tables[engine] = SlotTable(engine, accelerator)
    return LayerLink(engine, position, state.tables[engine])


class LayerLink:
    """A MoE layer's part of a chain; a `decode.capture.Link`.

    Args:
        position: the layer's in its engine.
        table: of that engine.
        sure: share of calls without a miss from which on `expects_hits`.
    """

    def __init__(self, engine: Engine, position: int, table: SlotTable, sure: float = SURE) -> None:
        accelerator = engine.accelerator
        assert isinstance(accelerator, ResidentExperts), "link_of() has checked it"
        self.engine = engine
        self.position = position
        self.memory: torch.Tensor | None = None
        """The slots that the graphs read; None before the capture."""
        self.table = table
        self._row = table.rows[position]
        self._accelerator = accelerator
        self._weights = engine.layers[position]
        self._routed = Stamp(accelerator)
        self._predicted = Stamp(accelerator)
        self.sure = sure
        self._hit_share = 0.0

    @property
    def usable(self) -> bool:
        """Whether what was captured reads the present slots."""
        return self.memory is self._accelerator.memory

    @property
    def may_skip_plan(self) -> bool:
        """Whether a call without a miss is the accelerator's alone, as its plan would say."""
        # `usable`, without its call: this is asked in every layer of every token.
        same_slots = self.memory is self._accelerator.memory
        return same_slots and self.engine.gives_hits_to_accelerator

    @property
    def expects_hits(self) -> bool:
        """Whether the layers behind should be launched before it is known that nothing misses."""
        return self._hit_share >= self.sure and self.may_skip_plan

    def prepare(self) -> None:
        # The row may name slots that were given back, and the first call reads what it names.
        self.table.update(self.position)
        self.table.push(self.position)

    def mark_routed(self) -> None:
        self._routed.mark()

    def mark_predicted(self) -> None:
        self._predicted.mark()

    def begin(self) -> None:
        self.memory = self._accelerator.memory
        self._routed.reset()
        self._predicted.reset()

    def replays(self, routed: bool) -> None:
        (self._routed if routed else self._predicted).expected += 1

    def predictions(self, on_host: list[torch.Tensor]) -> PendingCopy:
        return StampedCopy(self._predicted, on_host)

    def compute(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As the protocol says: of those that the table has a slot for."""
        slots = self._row[ids.to(torch.int64)]
        output = self._accelerator.resident(self._weights, hidden, slots, weights)
        return output.to(hidden.dtype)

    def launch(self, graph_break: GraphBreak) -> None:
        """Compute the experts from slots, behind what the device has to do."""
        self.table.update(self.position)
        self._replay(graph_break)

    def compute_slots(
        self, graph_break: GraphBreak, chosen: list[int], slots: Mapping[int, int]
    ) -> None:
        """Launch the experts of a call that lie in these slots, behind their arrival.

        Args:
            chosen: the call's experts.
            slots: expert -> slot of those that are to be computed.
        """
        coming = self.table.coming(self.position, slots)
        if coming:
            self._accelerator.wait_for(coming)
        self.table.show(self.position, chosen, slots)
        self._replay(graph_break)

    def await_routing(self) -> None:
        """Look at the host's memory until the routing decision is there."""
        self._routed.wait()

    def hits(self, chosen: list[int]) -> bool:
        """Whether these experts all lay in slots as the last launched graphs saw them."""
        return self.table.present[self.position].issuperset(chosen)

    def would_hit(self, chosen: list[int]) -> bool:
        """Whether graphs that are launched now will find these experts."""
        table, layer = self.table, self.position
        if table.would_miss(layer, chosen):
            return False  # the row may wait: only launched graphs need it
        table.update(layer)
        return table.present[layer].issuperset(chosen)

    def chosen(self, graph_break: GraphBreak) -> list[int]:
        """The experts of the call, as the host knows them."""
        return graph_break.memory.chosen()

    def plan_and_compute(self, call: Experts) -> torch.Tensor:
        """[1, H]: the experts of a call with a miss, by the engine.

        Not through the experts' module: a layer with hooks on it is launched the plain way.
        """
        output = self.engine.run(self.position, *call.inputs, call)
        self._accelerator.pump()
        return output

    def note_hit(self, call: Sent) -> None:
        """Do the bookkeeping of a call without a miss, and let waiting prefetches go."""
        self.engine.note_hit(self.position, call)
        self._accelerator.pump()

    def note(self, hit: bool) -> None:
        """Learn how often nothing misses."""
        self._hit_share += NEWEST * (hit - self._hit_share)

    def _replay(self, graph_break: GraphBreak) -> None:
        """Compute what the layer's row shows now."""
        assert graph_break.resident is not None
        self.table.push(self.position)
        graph_break.resident()
        self._accelerator.used_layer(self._weights)

    def recover(self) -> None:
        """After an unfinished pass; waits for the device."""
        self._routed.recover()
        self._predicted.recover()
