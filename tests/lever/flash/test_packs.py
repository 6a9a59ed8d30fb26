"""Packs: what is written is read again, and any damage gives a typed error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe_plugin.errors import FlashError
from lever_ext.flash.format import ALIGNMENT, MAGIC, header_bytes, parse_header
from lever_ext.flash.pack import FlashPack
from tests.lever.flash.toy import LAYERS, make


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
