"""Packing that is cut off anywhere is resumed, and never leaves half a pack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe_plugin.errors import FlashError, WeightsError
from lever_ext.flash import writer
from lever_ext.flash.format import ALIGNMENT
from lever_ext.flash.pack import FlashPack
from lever_ext.flash.source import StateDictSource
from lever_ext.flash.writer import write_pack
from tests.lever.flash.toy import LAYERS, Toy, make


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
