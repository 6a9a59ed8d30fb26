"""Files that a run writes: opened first, attached to the engine, complete however the run ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hybrimoe_plugin.cli.chat.records import Records
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.engine import CallRecord
from hybrimoe_plugin.engine.timeline import Timeline
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.replay.trace import read_trace

SPEC = ExpertSpec(64, 32, 8, 2, "Q8_0", "Q8_0", "Q8_0", 10, 10, 10)
CALL = CallRecord(
    layer=1,
    topk_ids=np.array([[3, 5]]),
    topk_weights=np.array([[0.5, 0.25]], np.float32),
    scores=np.linspace(0, 1, 8, dtype=np.float32)[None],
    predicted=(),
)


class Handle:
    def __init__(self, engines: int = 1) -> None:
        layers = [SimpleNamespace(spec=SPEC)] * 2
        self.engines = [SimpleNamespace(layers=layers, look_ahead=0) for _ in range(engines)]
        self.recorder: Any = None

    def record(self, recorder: Any) -> None:
        self.recorder = recorder

    def timeline(self, path: str) -> Timeline:
        return Timeline(path)


def model(handle: Handle | None) -> Any:
    return SimpleNamespace(hybrimoe=handle, config=SimpleNamespace(model_type="mixtral"))


def test_trace_holds_the_calls_and_recording_stops(tmp_path: Path) -> None:
    path, handle = tmp_path / "t.trace", Handle()
    with Records(None, str(path)) as records:
        records.attach(model(handle))
        handle.recorder(CALL)
    assert handle.recorder is None
    trace = read_trace(path)
    assert (trace.header.model, trace.header.layers, trace.header.expert_bytes) == (
        "mixtral",
        2,
        30,
    )
    assert trace.calls[0].ids.tolist() == [[3, 5]]


def test_files_are_complete_after_an_interrupt(tmp_path: Path) -> None:
    timeline, trace = tmp_path / "t.json", tmp_path / "t.trace"
    handle = Handle()

    def interrupted() -> None:
        with Records(str(timeline), str(trace)) as records:
            records.attach(model(handle))
            handle.recorder(CALL)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert timeline.read_text().endswith("]\n")
    assert len(read_trace(trace).calls) == 1


def test_unwritable_path_fails_before_the_model_is_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Records(str(tmp_path / "nowhere" / "t.json"), None).__enter__()


def test_nothing_asked_needs_no_engine() -> None:
    with Records(None, None) as records:
        records.attach(model(None))


@pytest.mark.parametrize(("handle", "found"), [(None, "no engine"), (Handle(2), "make 2")])
def test_what_cannot_be_recorded_is_refused(
    tmp_path: Path, handle: Handle | None, found: str
) -> None:
    with Records(None, str(tmp_path / "t")) as records, pytest.raises(ConfigError, match=found):
        records.attach(model(handle))


@pytest.mark.parametrize("flag", ["--timeline", "--record_trace"])
def test_files_of_other_kinds_are_not_replaced(flag: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and much more")
    names = (str(path), None) if flag == "--timeline" else (None, str(path))
    with pytest.raises(ConfigError, match=f"{flag} .*model.gguf exists and is not replaced"):
        Records(*names).__enter__()
    assert path.read_bytes() == b"GGUF and much more"


def test_former_files_are_replaced_once_there_is_a_model(tmp_path: Path) -> None:
    timeline, trace = tmp_path / "t.json", tmp_path / "t.trace"
    for _ in range(2):
        handle = Handle()
        with Records(str(timeline), str(trace)) as records:
            if timeline.stat().st_size:
                assert read_trace(trace).calls
            records.attach(model(handle))
            handle.recorder(CALL)
    with Records(str(timeline), str(trace)):
        pass
    assert len(read_trace(trace).calls) == 1
    assert timeline.read_text().endswith("]\n")


def test_a_file_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="--timeline is empty"):
        Records("", None).__enter__()
