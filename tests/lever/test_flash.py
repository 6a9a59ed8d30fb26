"""The flash store: packs, reads, streams, and everything that can be wrong with them."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hybrimoe_plugin.errors import BudgetError, ConfigError, FlashError, WeightsError
from lever_ext.flash import writer
from lever_ext.flash.dram_plan import plan_dram
from lever_ext.flash.format import ALIGNMENT, MAGIC, header_bytes, parse_header
from lever_ext.flash.pack import FlashPack
from lever_ext.flash.reader import Buffer, FlashReader, Throttle
from lever_ext.flash.source import StateDictSource
from lever_ext.flash.stream import LayerStream
from lever_ext.flash.writer import write_pack

LAYERS = 6


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 96)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(64)


def make(
    directory: Path, seed: int = 0, dtype: str = "float32"
) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    model = Toy()
    state = dict(model.state_dict())
    return write_pack(
        StateDictSource(state, f"toy {seed}"), model, {"seed": seed}, directory, dtype
    ), state


def test_round_trip(tmp_path: Path) -> None:
    path, state = make(tmp_path)
    pack = FlashPack.open(tmp_path)
    found = {name: t for block in pack.index.blocks for name, t in pack.load(block).items()}
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert [block.kind for block in pack.index.blocks] == [
        "resident",
        *["layer"] * LAYERS,
        "resident",
    ]
    assert all(
        block.offset % ALIGNMENT == 0 == block.nbytes % ALIGNMENT for block in pack.index.blocks
    )
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.journal"))
    pack.close()


def test_fingerprint_names_the_model(tmp_path: Path) -> None:
    prints = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        pack = FlashPack.open(make(tmp_path / name, seed)[0])
        prints.append(pack.index.fingerprint)
        pack.close()
    assert prints[0] == prints[1] != prints[2]


class Killed(Exception):
    pass


def test_a_killed_pack_is_no_pack_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    torch.manual_seed(0)
    model, calls = Toy(), []
    source = StateDictSource(dict(model.state_dict()), "toy")

    def kill(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 4:
            raise Killed

    with pytest.raises(Killed):
        write_pack(source, model, {}, tmp_path, "float32", kill)
    with pytest.raises(FlashError, match="cannot open"):
        FlashPack.open(tmp_path)
    with pytest.raises(FlashError, match="never finished"):
        FlashPack.open(tmp_path / "target.lever.partial")
    calls.clear()
    write_pack(source, model, {}, tmp_path, "float32", lambda done, total: calls.append(done))
    assert len(calls) == LAYERS + 2 - 4
    pack = FlashPack.open(tmp_path)
    for block in pack.index.blocks:
        pack.load(block)
    pack.close()


def _cut(data: bytes, keep: int = 3) -> bytes:
    """Without the end of the last line."""
    return data[: data[:-1].rindex(b"\n") + keep]


def _swapped(data: bytes) -> bytes:
    first, second, third, *rest = data.splitlines(keepends=True)
    return b"".join([first, third, second, *rest])


TORN_JOURNALS: dict[str, Callable[[bytes], bytes]] = {
    "half a line": _cut,
    "half a line that another follows": lambda data: (
        _cut(data) + data.splitlines(keepends=True)[-1]
    ),
    "half a line that ends": lambda data: _cut(data) + b"\n",
    "the last line twice": lambda data: data + data.splitlines(keepends=True)[-1],
    "lines in another order": _swapped,
    "garbage between": lambda data: data.replace(b"\n", b"\n\0\xff\n", 1),
    "garbage at the end": lambda data: data + b"\0" * 512,
    "zeros in place of the last line": lambda data: _cut(data, 0) + bytes(40),
    "a changed checksum": lambda data: _cut(data, 0) + b"12345\n",
    "another version's": lambda data: data.splitlines()[0] + b"\n1\n2\n3\n",
    "another model's": lambda data: b"0" * 64 + data[64:],
    "empty": lambda data: b"",
    "its key alone, cut off": lambda data: data[:20],
}
TORN_DATA: dict[str, Callable[[bytes], bytes]] = {
    "the first block zero": lambda data: (
        data[:ALIGNMENT] + bytes(ALIGNMENT) + data[2 * ALIGNMENT :]
    ),
    "cut off inside a block": lambda data: data[: 2 * ALIGNMENT],
    "empty": lambda data: b"",
}


class Interrupted:
    """A toy model whose packing is cut off after some blocks."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(0)
        self.model = Toy()
        self.directory = directory
        self.written = 0

    def pack(self, blocks: int | None = None) -> None:
        self.written = 0

        def count(_done: int, _total: int) -> None:
            self.written += 1
            if self.written == blocks:
                raise Killed

        source = StateDictSource(dict(self.model.state_dict()), "toy")
        write_pack(source, self.model, {}, self.directory, "float32", count)

    def change(self, name: str, how: Callable[[bytes], bytes]) -> None:
        path = self.directory / f"target.lever.{name}"
        path.write_bytes(how(path.read_bytes()))

    def check(self) -> None:
        pack = FlashPack.open(self.directory)
        found = {name: t for block in pack.index.blocks for name, t in pack.load(block).items()}
        pack.close()
        for name, value in self.model.state_dict().items():
            assert torch.equal(found[name], value)


@pytest.mark.parametrize(
    ("name", "how"),
    [("journal", case) for case in TORN_JOURNALS] + [("partial", case) for case in TORN_DATA],
)
def test_whatever_a_crash_leaves_the_finished_pack_is_right(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    toy = Interrupted(tmp_path)
    with pytest.raises(Killed):
        toy.pack(4)
    toy.change(name, {"journal": TORN_JOURNALS, "partial": TORN_DATA}[name][how])
    with pytest.raises(Killed):
        toy.pack(2)
    toy.pack()
    toy.check()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_damage_to_what_a_crash_leaves(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SYNC_BYTES", 1)
        toy = Interrupted(tmp_path_factory.mktemp("pack"))
        for blocks in (3, 2):
            with pytest.raises(Killed):
                toy.pack(blocks)
            name = data.draw(st.sampled_from(["journal", "partial"]))
            at, junk = data.draw(st.floats(0, 1)), data.draw(st.binary(max_size=8))
            cut = data.draw(st.booleans())

            def damaged(
                content: bytes, at: float = at, junk: bytes = junk, cut: bool = cut
            ) -> bytes:
                place = int(at * len(content))
                return content[:place] + junk + (b"" if cut else content[place + len(junk) :])

            toy.change(name, damaged)
        toy.pack()
        toy.check()


def test_what_is_on_the_disk_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One torn line costs one block, not the whole pack."""
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    toy = Interrupted(tmp_path)
    with pytest.raises(Killed):
        toy.pack(5)
    toy.change("journal", _cut)
    toy.pack()
    assert toy.written == LAYERS + 2 - 4


def test_a_failed_pack_leaves_the_former_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = make(tmp_path)
    before = path.read_bytes()
    state = dict(Toy().state_dict())
    del state["norm.bias"]
    with pytest.raises(WeightsError, match=r"norm\.bias"):
        write_pack(StateDictSource(state, "half"), Toy(), {}, tmp_path)
    usage = type(writer.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(FlashError, match="MiB are free"):
        make(tmp_path, seed=3)
    monkeypatch.undo()
    monkeypatch.setattr(
        writer.os,
        "pwrite",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(FlashError, match="No space left"):
        make(tmp_path, seed=3)
    assert path.read_bytes() == before


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_damage_gives_a_typed_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, state = make(tmp_path_factory.mktemp("pack"))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        # Padding carries no meaning: only bytes that do are damaged.
        at = data.draw(
            st.one_of(st.integers(0, 35), st.integers(len(content) - 3000, len(content) - 1))
        )
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(FlashError):
        pack = FlashPack.open(path)
        try:
            for block in pack.index.blocks:
                pack.load(block)
        finally:
            pack.close()


def test_a_damaged_block_is_found_when_it_is_read(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    content = bytearray(path.read_bytes())
    content[ALIGNMENT + 5] ^= 1
    path.write_bytes(content)
    pack = FlashPack.open(path)
    with pytest.raises(FlashError, match="resident is damaged"):
        pack.load(pack.index.blocks[0])
    pack.close()


@pytest.mark.parametrize("empty", ["block resident is empty", "holds no blocks"])
def test_what_holds_nothing_is_refused(empty: str, tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    pack = FlashPack.open(path)
    first, *others = pack.index.blocks
    pack.close()
    raw = path.read_bytes()
    offset, _, _ = parse_header(raw[:ALIGNMENT], len(raw), "sound")
    blocks = () if "no blocks" in empty else (replace(first, tensors=()), *others)
    index = replace(pack.index, blocks=blocks).to_bytes()
    path.write_bytes(header_bytes(offset, index) + raw[ALIGNMENT:offset] + index)
    with pytest.raises(FlashError, match=empty):
        FlashPack.open(path)


@pytest.mark.parametrize(
    "content", [b"", b"GGUF" + b"\0" * 5000, MAGIC + (9).to_bytes(4, "little") + b"\0" * 5000]
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.lever"
    path.write_bytes(content)
    with pytest.raises(FlashError, match="not a flash pack|version 9"):
        FlashPack.open(path)


def test_change_and_truncation_while_running(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    pack = FlashPack.open(path)
    stream = LayerStream(pack, 0, 2)
    stream.acquire(0)
    stream.release(0)
    os.truncate(path, ALIGNMENT * 3)
    with pytest.raises(FlashError, match="changed|truncated"):
        for layer in range(1, LAYERS):
            stream.acquire(layer)
            stream.release(layer)
    pack.close()


def test_a_block_that_changes_under_its_old_time_is_found(tmp_path: Path) -> None:
    path, state = make(tmp_path)
    pack = FlashPack.open(path)
    stream = LayerStream(pack, 0, 2)
    for layer in range(LAYERS):
        stream.acquire(layer)
        stream.release(layer)
    stream.reset(0)
    before = path.stat()
    os.chmod(path, 0o600)  # not a change that matters
    for layer in range(LAYERS):
        _, tensors = stream.acquire(layer)
        assert torch.equal(
            tensors[f"layers.{layer}.linear.weight"], state[f"layers.{layer}.linear.weight"]
        )
        stream.release(layer)
    stream.reset(0)
    with path.open("r+b") as file:
        file.seek(pack.blocks("layer")[3].offset + 8)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(FlashError, match="target.lever: block layer 3 is damaged"):
        for layer in range(LAYERS):
            stream.acquire(layer)
            stream.release(layer)
    pack.close()


def test_a_removed_pack_is_read_to_the_end(tmp_path: Path) -> None:
    path, state = make(tmp_path)
    pack = FlashPack.open(path)
    path.unlink()
    stream = LayerStream(pack, 1, 2)
    for layer in range(LAYERS):
        _, tensors = stream.acquire(layer)
        name = f"layers.{layer}.linear.weight"
        torch.testing.assert_close(tensors[name], state[name])
        stream.release(layer)
    pack.close()


@pytest.mark.parametrize(("resident", "ring"), [(0, 2), (2, 3), (5, 2), (LAYERS, 0)])
def test_stream_hands_out_every_layer_in_every_pass(
    tmp_path: Path, resident: int, ring: int
) -> None:
    path, state = make(tmp_path)
    pack = FlashPack.open(path)
    stream = LayerStream(pack, resident, ring)
    for _ in range(3):
        for layer in range(LAYERS):
            _, tensors = stream.acquire(layer)
            name = f"layers.{layer}.linear.weight"
            torch.testing.assert_close(tensors[name], state[name], rtol=0, atol=0)
            stream.release(layer)
    # A pass that is cut off in the middle must not upset the next one.
    for layer in range(4):
        stream.acquire(layer)
        if layer < 3:
            stream.release(layer)
    for layer in range(LAYERS):
        _, tensors = stream.acquire(layer)
        torch.testing.assert_close(
            tensors[f"layers.{layer}.linear.weight"], state[f"layers.{layer}.linear.weight"]
        )
        stream.release(layer)
    pack.close()


def test_budget_is_spent_on_first_layers_and_never_exceeded(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    pack = FlashPack.open(path)
    layer = pack.blocks("layer")[0].nbytes
    fixed = sum(block.nbytes for block in pack.blocks("resident"))
    with pytest.raises(BudgetError, match="dram_budget"):
        plan_dram(pack, fixed + 2 * layer - 1)
    assert plan_dram(pack, fixed + 2 * layer).layers == 0
    for budget in range(fixed + 2 * layer, fixed + LAYERS * layer, 3000):
        residency = plan_dram(pack, budget)
        assert residency.nbytes <= budget and residency.ring >= 2
    assert plan_dram(pack, fixed + LAYERS * layer) == plan_dram(pack, None)
    assert plan_dram(pack, None).ring == 0
    pack.close()


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
