"""The question about loading, on a file of one layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import loading


@pytest.mark.slow
def test_a_mapped_file_takes_little_memory(tmp_path: Path) -> None:
    found = loading.main(["--layers", "1", "--repetitions", "1", "--out", str(tmp_path)])
    assert found["tensors"] > 3 * 128
    # What loading itself needs, such as lists of tensors, and no page of half a GiB of weights.
    assert found["mapped_anonymous_mib"] < found["dense_mib"] + 300
    assert (tmp_path / "loading.csv").exists()
