"""One MoE layer call: learn -> plan -> run -> look ahead.

These are the names for other packages; modules in here import each other directly.
"""

from hybrimoe_plugin.engine.clock import SimulatedClock, WallClock
from hybrimoe_plugin.engine.engine import Engine
from hybrimoe_plugin.engine.view import CallRecord, HostView, Router, Sent

__all__ = ["CallRecord", "Engine", "HostView", "Router", "Sent", "SimulatedClock", "WallClock"]
