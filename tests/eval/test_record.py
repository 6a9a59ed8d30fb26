"""A recorded trace holds what the model routed, whatever number of experts was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import record
from hybrimoe_plugin.replay.trace import read_trace


@pytest.mark.slow
def test_a_recorded_run_is_a_whole_trace(tmp_path: Path) -> None:
    flags = ["--experts", "4", "--top_k", "2", "--tokens", "3"]
    result = record.main([*flags, "--out", str(tmp_path)])
    trace = read_trace(tmp_path / "smollm2-4x2.trace")
    header = trace.header
    assert header.layers == 30
    assert header.experts == 4
    assert header.top_k == 2
    assert header.predictions == "recorded"
    tokens = [len(call.ids) for call in trace.calls if call.layer == 0]
    # The last token of the answer is never computed.
    single = [1] * (result["answer_tokens"] - 1)
    assert tokens == [result["prompt_tokens"], *single]
    assert len(trace.calls) == 30 * len(tokens)
    assert all(call.predicted for call in trace.calls if call.layer < 29)
