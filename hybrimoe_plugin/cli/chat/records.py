"""Files that a run writes besides the answer: the timeline and the routing trace."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.files import check_replaceable

if TYPE_CHECKING:
    from hybrimoe_plugin.engine import CallRecord
    from hybrimoe_plugin.engine.timeline import Timeline
    from hybrimoe_plugin.operators.bind import HybriMoE
    from hybrimoe_plugin.replay.trace import TraceWriter


class Records:
    """A context that opens the files before the model is loaded and completes them at its end.

    Args:
        timeline: path of the trace for Perfetto, None for none.
        trace: path of the routing trace for the replay simulator, None for none.
        quiet: say nothing about finished files.

    Raises:
        OSError: a file cannot be written; raised on entering, before the model is loaded.
        ConfigError: there is a file of another kind; raised on entering too.
    """

    def __init__(self, timeline: str | None, trace: str | None, quiet: bool = False) -> None:
        self._timeline = timeline
        self._trace = trace
        self._quiet = quiet
        self._open = ExitStack()

    def __enter__(self) -> Records:
        from hybrimoe_plugin.engine.timeline import is_timeline
        from hybrimoe_plugin.replay.trace.format import is_trace

        if self._timeline is not None:
            check_replaceable(self._timeline, "--timeline", "timeline", is_timeline)
            _check_writable(self._timeline)
        if self._trace is not None:
            check_replaceable(self._trace, "--record_trace", "routing trace", is_trace)
            _check_writable(self._trace)
        return self

    def attach(self, model: Any) -> None:
        """Let the model's engine write the files.

        Raises:
            ConfigError: the model has no engine, or several for one routing trace.
        """
        if self._timeline is None and self._trace is None:
            return
        handle: HybriMoE | None = getattr(model, "hybrimoe", None)
        if handle is None:
            raise ConfigError("nothing to record: the rules injected no engine into this model")
        if self._timeline is not None:
            self._open.callback(_finish, handle.timeline(self._timeline), self._quiet)
        if self._trace is not None:
            writer = _trace_writer(self._trace, handle, str(model.config.model_type))
            self._open.callback(writer.close)
            handle.record(_recorder(writer))
            # Callbacks run in reverse order: recording stops before the file is closed.
            self._open.callback(handle.record, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._open.close()


def _check_writable(path: str) -> None:
    """Raises: OSError: it is not. A former file stays until there is something to write."""
    if not Path(path).is_fifo():  # whose reader would take this for the end
        with open(path, "ab"):
            pass


def _finish(timeline: Timeline, quiet: bool) -> None:
    """Complete the file and say what it shows."""
    timeline.close()
    if not quiet:
        notice(f"timeline: {timeline.summary()}")


def _trace_writer(path: str, handle: HybriMoE, model: str) -> TraceWriter:
    from hybrimoe_plugin.replay.trace import TraceHeader, TraceWriter

    if len(handle.engines) != 1:
        count = len(handle.engines)
        raise ConfigError(f"--record_trace needs one engine, these rules make {count}")
    engine = handle.engines[0]
    spec = engine.layers[0].spec
    header = TraceHeader(
        model=model,
        layers=len(engine.layers),
        experts=spec.experts,
        top_k=spec.top_k,
        expert_bytes=spec.expert_bytes,
        source="recorded by hybrimoe local_chat",
        predictions="recorded" if engine.look_ahead else "none",
    )
    # MRS reads the 2k highest scores of a token; more would only make the file larger.
    return TraceWriter(path, header, score_top=2 * spec.top_k)


def _recorder(writer: TraceWriter) -> Any:
    from hybrimoe_plugin.replay.trace import Call

    def record(call: CallRecord) -> None:
        writer.write(
            Call(call.layer, call.topk_ids, call.topk_weights, call.scores, call.predicted)
        )

    return record
