"""Decoder layers launched one behind the other, ahead of what the host knows.

A layer whose experts all lie in slots needs no plan: its graphs find the slots in a table on the
device (`slot_table`), compute, and go on. The host launches the graphs of the next layers before it
knows whether there was a miss, reads each routing decision from its own memory as it arrives
(`stamp`), and does the bookkeeping of a hit while the device is at the layers behind:

    host     launch 3 | launch 4 | read 3: hit, launch 5, note 3 | read 4: hit, launch 6, note 4
    device   | layer 3                | layer 4                     | layer 5

Where an expert was missing the device has computed nothing of use from there on. The engine then
plans that layer; the experts in slots are again the graphs' part, and the engine computes the
others. The layers behind are launched again:

    host     launch 3 | launch 4 | read 3: miss | plan and compute 3 | launch 4 | ...
    device   | layer 3  | layer 4: void |       | layer 3            | layer 4

Nothing is lost by that: what a void layer writes (its entry of the KV cache, its output) is written
again, and its input, the output of the layer before it, is still there. Where a layer often has
misses, nothing is launched behind it before its routing is known.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hybrimoe_plugin.decode.capture import GraphBreak, LayerGraphs
from hybrimoe_plugin.decode.chain.link import LayerLink
from hybrimoe_plugin.engine.view import HostView, Predictions

AHEAD = 2
"""MoE layers that may be launched whose routing is not known yet.

While the device is at one, the host launches the next one.
"""


class LayerCall:
    """One launched layer; its experts' `Sent` where the engine computes them after all.

    Attributes:
        source: [1, 1, H], its input.
        graph_break: of a layer with experts.
        whole: whether all of its graphs were launched, before its routing was known.
        chosen: [K] the experts, once they are known.
        later: what the later routers would choose, if they were asked.
    """

    __slots__ = ("chosen", "graph_break", "graphs", "later", "link", "source", "whole")
    graph_break: GraphBreak

    def __init__(self, graphs: LayerGraphs, source: torch.Tensor, link: LayerLink | None) -> None:
        self.graphs = graphs
        self.source = source
        self.link = link
        self.whole = False
        self.chosen: list[int] = []
        self.later: Predictions | None = None
        if link is not None:
            assert graphs.graph_break is not None
            self.graph_break = graphs.graph_break

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `decode.capture.Experts` says; so do the three below."""
        return self.graph_break.inputs

    def seen(self) -> HostView:
        return self.graph_break.memory.view(self.chosen, self.later)

    @property
    def finds_slots(self) -> bool:
        return self.link is not None and self.link.usable

    def from_slots(self, slots: Mapping[int, int]) -> torch.Tensor:
        assert self.link is not None
        self.link.compute_slots(self.graph_break, self.chosen, slots)
        return self.graph_break.output

    def route(self) -> None:
        """Launch what comes before the experts, and the later routers."""
        self.later = None
        self.graphs.route()
        link = self.link
        if link is not None and link.engine.wants_predictions and self.graph_break.predict():
            self.later = self.graph_break.marked

    def finish(self) -> None:
        """Launch the experts from their slots and what comes behind them."""
        assert self.link is not None
        assert self.graphs.after is not None
        self.link.launch(self.graph_break)
        self.graphs.after()
        self.whole = True

    def compute_missing(self) -> None:
        """Let the engine compute the experts, then launch what comes behind them."""
        assert self.link is not None
        assert self.graphs.after is not None
        if self.whole:
            # What lies behind the experts may have overwritten what it reads, and the experts'
            # inputs: once more from the beginning, while the engine plans.
            self.graphs.hidden.copy_(self.source)
            self.graphs.route()
        output = self.link.plan_and_compute(self)
        if self.whole:
            self.link.await_routing()
            chosen = self.graph_break.memory.chosen()
            if chosen != self.chosen:
                # A tie that fell otherwise: sums need not have one order on a device.
                self.chosen = chosen
                output = self.link.plan_and_compute(self)
        if output is not self.graph_break.output:
            self.graph_break.output.copy_(output)
        self.graphs.after()


class Chain:
    """The launched layers of one device's decode step whose routing is not known yet."""

    def __init__(self) -> None:
        self._open: list[LayerCall] = []
        """From the first one whose routing is not known."""
        self._hits: list[LayerCall] = []
        """Known to have had no miss, not noted yet."""
        self.last: torch.Tensor | None = None
        """Output of the layer that was launched last, whose copy is the next one's input.

        None where anyone may have read it, or changed it in place.
        """

    def run(
        self,
        graphs: LayerGraphs,
        hidden: torch.Tensor,
        link: LayerLink | None,
        final: bool,
    ) -> torch.Tensor:
        """Launch a layer; its output [1, 1, H] is right once it is computed, unless a layer missed.

        Args:
            hidden: [1, 1, H], the layer's input.
            link: of a MoE layer, which must be usable; None for a layer without experts.
            final: whether whatever reads the output does not ask `make_right` first. Then the
                output is right without exception.
        """
        if hidden is not self.last:
            self.settle()
            graphs.hidden.copy_(hidden)
        call = LayerCall(graphs, hidden, link)
        self.last = None
        while len(self._open) >= AHEAD and self._unknown() >= AHEAD:
            self._learn_next()
        self._open.append(call)
        self._launch(call)
        if final or not call.whole:
            self._learn_all()
        output = graphs.output
        if final:
            return output
        self.last = output
        if self._hits:  # what comes behind the last layer is launched first
            self._note_hits()
        return output

    def make_right(self) -> bool:
        """Learn what every launched layer's routing was, and put right what missed.

        Returns:
            whether every output was right when it was given out.
        """
        right = self._learn_all()
        self.last = None
        return right

    def settle(self) -> bool:
        """As `make_right`, and do the bookkeeping of what had no miss."""
        right = self.make_right()
        self._note_hits()
        return right

    def forget(self) -> None:
        """Drop what an interrupted pass has left."""
        self._open.clear()
        self._hits.clear()
        self.last = None

    def _unknown(self) -> int:
        return sum(call.link is not None for call in self._open)

    def _launch(self, call: LayerCall) -> None:
        call.route()
        if call.link is None:
            call.whole = True
        elif call.link.expects_hits:
            call.finish()

    def _learn_all(self) -> bool:
        """Learn every unknown routing; whether none of them had a miss."""
        hits = True
        while self._open:
            hits &= self._learn_next()
        return hits

    def _learn_next(self) -> bool:
        """Learn the first unknown routing; where it has a miss, launch the rest again.

        Returns:
            whether it had none.
        """
        call = self._open[0]
        link = call.link
        if link is None:
            del self._open[0]
            return True
        link.await_routing()
        call.chosen = chosen = call.graph_break.memory.chosen()
        if call.whole:
            hit = link.hits(chosen)
        else:
            hit = link.may_skip_plan and link.would_hit(chosen)
            if hit:
                call.finish()
        link.note(hit)
        if hit:
            del self._open[0]
            self._hits.append(call)
            return True
        if self._hits:
            self._note_hits()
        call.compute_missing()
        del self._open[0]
        behind, self._open = self._open, []
        for void in behind:
            self._open.append(void)
            void.whole = False
            self._launch(void)
            if not void.whole:
                self._learn_all()
        return False

    def _note_hits(self) -> None:
        """Do the bookkeeping of hits, in the order of the layers."""
        while self._hits:
            call = self._hits[0]
            assert call.link is not None
            call.link.note_hit(call)
            del self._hits[0]
