"""Damaged and hostile flash packs, opened and asked for a few tokens."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lever_ext.flash.format import ALIGNMENT, HEADER, header_bytes, parse_header
from lever_ext.packing import pack_model
from tests.fuzz.json_values import changed, hurt
from tests.fuzz.models import Chat


def cases(
    rng: random.Random, folder: Path, models: dict[str, Path]
) -> Iterator[tuple[str, Callable[[], int | None]]]:
    """(what was done, a call that tries it), without end."""
    source = pack_model(folder / "sound", gguf_path=models["mixtral"], dtype="float32")
    raw = source.read_bytes()
    offset, nbytes, _ = parse_header(raw[:ALIGNMENT], len(raw), "sound")
    index = json.loads(raw[offset : offset + nbytes])
    directory = folder / "pack"
    shutil.copytree(source.parent, directory)
    changes = (_bytes, _header, _index, _index, _index)
    while True:
        what, made = rng.choice(changes)(rng, raw, offset, index)
        (directory / source.name).write_bytes(made)
        yield what, Chat("--flash_pack", str(directory))


def _bytes(
    rng: random.Random, raw: bytes, offset: int, index: dict[str, object]
) -> tuple[str, bytes]:
    del index
    place = rng.choice((0, offset, rng.randrange(len(raw))))
    return f"bytes from {place}", raw[:place] + hurt(rng, raw[place:])


def _header(
    rng: random.Random, raw: bytes, offset: int, index: dict[str, object]
) -> tuple[str, bytes]:
    """Fields of the header changed, its checksum right again."""
    del index
    fields = list(HEADER.unpack_from(raw))
    place = rng.randrange(1, len(fields))
    fields[place] = rng.choice((0, 1, 2, 4096, fields[place] + 1, offset, 2**31, 2**32 - 1))
    packed = HEADER.pack(*fields)
    head = (packed + zlib.crc32(packed).to_bytes(4, "little")).ljust(ALIGNMENT, b"\0")
    return f"header {fields}", head + raw[ALIGNMENT:]


def _index(
    rng: random.Random, raw: bytes, offset: int, index: dict[str, object]
) -> tuple[str, bytes]:
    """Values of the index changed, all checksums right again, the fingerprint in half of
    the cases.
    """
    value = changed(rng, index)
    text = json.dumps(value).encode()
    if rng.random() < 0.5:
        text = _fingerprinted(text)
    what = next(
        (key for key in index if not isinstance(value, dict) or value.get(key) != index[key]),
        "nothing",
    )
    return f"index: {what}", header_bytes(offset, text) + raw[ALIGNMENT:offset] + text


def _fingerprinted(text: bytes) -> bytes:
    """The index as whoever makes a hostile pack would write it."""
    import dataclasses
    import hashlib

    from lever_ext.flash.format import _block

    body = json.loads(text)
    try:
        blocks = [dataclasses.asdict(_block(entry)) for entry in body["blocks"]]
        canonical = json.dumps([dict(body["config"]), blocks], sort_keys=True)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return text
    body["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps(body).encode()
