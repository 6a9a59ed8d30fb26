"""Routing traces: what the routers chose, call by call, as a file that can be replayed."""

from hybrimoe_plugin.replay.trace.data import Call, Trace, TraceHeader, check_header
from hybrimoe_plugin.replay.trace.format import FORMAT, VERSION
from hybrimoe_plugin.replay.trace.reader import read_trace
from hybrimoe_plugin.replay.trace.writer import TraceWriter, write_trace

__all__ = [
    "FORMAT",
    "VERSION",
    "Call",
    "Trace",
    "TraceHeader",
    "TraceWriter",
    "check_header",
    "read_trace",
    "write_trace",
]
