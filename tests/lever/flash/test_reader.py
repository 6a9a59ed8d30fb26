"""Direct reads: the fallback, the throttle, many requests at once."""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

import pytest

from hybrimoe_plugin.errors import ConfigError
from lever_ext.flash.format import ALIGNMENT
from lever_ext.flash.pack import FlashPack
from lever_ext.flash.reader import Buffer, FlashReader, Throttle
from tests.lever.flash.toy import make


def test_reads_fall_back_without_o_direct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = make(tmp_path)
    real = os.open

    def refuse(name: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(name, flags, *rest)

    monkeypatch.setattr("lever_ext.flash.reader.os.open", refuse)
    pack = FlashPack.open(path)
    assert not pack.reader.direct and "no direct reads" in caplog.text
    pack.load(pack.index.blocks[0])
    pack.close()


def test_throttle_keeps_to_its_bandwidth(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 20))
    reader = FlashReader(path, chunk_bytes=1 << 16, throttle=Throttle.parse("0.01"))
    begin = time.perf_counter()
    reader.read(0, 1 << 20, Buffer(1 << 20))
    assert time.perf_counter() - begin >= 0.1
    assert reader.counters.nbytes == 1 << 20 and reader.counters.busy_us >= 1e5
    assert "ufs4.0" in Throttle.parse("ufs4.0").label
    with pytest.raises(ConfigError, match="throttle"):
        Throttle.parse("warp")
    reader.close()


def test_many_requests_at_once_land_where_they_should(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"".join(bytes([i]) * ALIGNMENT for i in range(200)))
    reader = FlashReader(path, threads=3, chunk_bytes=ALIGNMENT)
    buffers = Buffer.several(50, 4 * ALIGNMENT - 1)
    arrivals = [reader.submit(i * 4 * ALIGNMENT, 4 * ALIGNMENT, b) for i, b in enumerate(buffers)]
    for i, (arrival, buffer) in enumerate(zip(arrivals, buffers, strict=True)):
        arrival.result()
        expected = zlib.crc32(b"".join(bytes([4 * i + j]) * ALIGNMENT for j in range(4)))
        assert zlib.crc32(buffer.memory) == expected
    reader.close()
