"""Damaged and hostile GGUF files, loaded and asked for a few tokens."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.gguf_file import ARRAY, File, Tensor, parse, serialise
from tests.fuzz.models import Chat

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")
FLAGS = (
    (),
    (),
    ("--weights", "mapped"),
    ("--dense", "dequantised"),
    ("--accelerator", "emulated", "--cache_ratio", "0.5"),
    ("--cpu_backend", "torch"),
)
_VALUES = (
    *((4, value) for value in (0, 1, 2, 3, 5, 7, 33, 97, 10**6, 2**31 - 1, 2**32 - 1)),
    *(
        (kind, value)
        for kind in (6, 12)
        for value in (0.0, -0.0, -1.0, 1e-45, 1e38, math.nan, math.inf, -math.inf)
    ),
    *((10, value) for value in (2**40, 2**63, 2**64 - 1)),
    *(
        (9, value)
        for value in ((4, []), (4, [1, 2]), (9, [(4, [1])]), (8, [b"a"]), (6, [0.0, math.nan]))
    ),
    *((9, (kind, [], count)) for kind in (0, 4, 8, 9) for count in (2**20, 2**40, 2**63)),
    *(
        (8, value)
        for value in (b"", b"x", b"\xff\xfe\0", b"llama", b"deepseek2", b"{{ 1 }}", b"a" * 100_000)
    ),
    (5, -1),
    (7, True),
    (12, 1e308),
    (13, b""),
    (255, b""),
)
_OFFSETS = (0, 1, 2**40, 2**63, 2**64 - 1, 2**64 - 32)
_FILLS = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff", b"\0", b"\0\x7e", b"\xff\xff\x7f\x7f")
"""Bytes of NaN, infinity, zero and the largest numbers in several types."""


class Source(NamedTuple):
    raw: bytes
    file: File

    @property
    def header(self) -> int:
        return len(self.raw) - len(self.file.data)


def cases(
    rng: random.Random, folder: Path, models: dict[str, Path]
) -> Iterator[tuple[str, Callable[[], int | None]]]:
    """(what was done, a call that tries it), without end."""
    sources = {
        family: Source(raw := models[family].read_bytes(), parse(raw)) for family in FAMILIES
    }
    changes = (
        _truncated,
        _counted,
        _field,
        _field,
        _field,
        _nested,
        _tensor,
        _tensor,
        _data,
        _flipped,
        _flipped,
    )
    path = folder / "model.gguf"
    while True:
        family, change, flags = rng.choice(FAMILIES), rng.choice(changes), rng.choice(FLAGS)
        what, made = change(rng, sources[family])
        path.write_bytes(made)
        yield f"{family}: {what} {' '.join(flags)}", Chat("--gguf_path", str(path), *flags)


def _truncated(rng: random.Random, source: Source) -> tuple[str, bytes]:
    length = rng.randrange(source.header if rng.random() < 0.6 else len(source.raw))
    return f"{length} bytes of {len(source.raw)}", source.raw[:length]


def _counted(rng: random.Random, source: Source) -> tuple[str, bytes]:
    if rng.random() < 0.3:
        version = rng.choice((0, 1, 2, 4, 99, 3 << 24))
        return f"version {version}", source.raw[:4] + struct.pack("<I", version) + source.raw[8:]
    file = source.file.fresh()
    true = len(file.tensors), len(file.fields)
    place, count = rng.randrange(2), rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
    count = rng.choice((count, max(0, true[place] + rng.choice((-1, 1)))))
    file.counts = (count, None) if place == 0 else (None, count)
    return f"counts {file.counts}", serialise(file)


def _field(rng: random.Random, source: Source) -> tuple[str, bytes]:
    file = source.file.fresh()
    place = rng.randrange(len(file.fields))
    entry = file.fields[place]
    name, action = entry.key.decode(), rng.random()
    if action < 0.08:
        del file.fields[place]
        return f"{name} missing", serialise(file)
    if action < 0.12:
        file.fields.append(entry)
        return f"{name} twice", serialise(file)
    kind, value = rng.choice(_VALUES)
    if action < 0.35 and isinstance(entry.value, int | float) and not isinstance(entry.value, bool):
        kind = entry.kind
        number = rng.choice((entry.value + 1, entry.value - 1, entry.value * 2, entry.value / 2))
        value = number if kind in (6, 12) else min(max(int(number), 0), 2**31 - 1)
    elif action < 0.5 and entry.kind == ARRAY and entry.value[1]:
        kind, value = entry.kind, _changed_array(rng, entry.value)
    elif action < 0.56:
        file.fields.append(replace(entry, key=_other_key(rng, entry.key), kind=kind, value=value))
        return f"{file.fields[-1].key!r} added: {kind} {str(value)[:40]}", serialise(file)
    file.fields[place] = replace(entry, kind=kind, value=value)
    return f"{name} = {kind} {str(value)[:40]}", serialise(file)


def _changed_array(rng: random.Random, value: tuple[int, list[object]]) -> tuple[int, list[object]]:
    kind, values = value[0], list(value[1])
    action = rng.randrange(4)
    if action == 0:
        values = values[: rng.randrange(len(values))]
    elif action == 1:
        values *= rng.choice((2, 10))
    elif action == 2:
        values[rng.randrange(len(values))] = rng.choice(values)
    elif kind == 8:
        values[rng.randrange(len(values))] = rng.choice(
            (b"", b"\xff", b"\xed\xa0\x80", b"x" * 10_000, b"a b c")
        )
    return kind, values


def _other_key(rng: random.Random, key: bytes) -> bytes:
    stem = key.split(b".")[0]
    return rng.choice((
        b"",
        b"\xff",
        b"general.alignment",
        b"split.count",
        stem + b".rope.scaling.type",
        stem + b".rope.scaling.factor",
        stem + b".attention.sliding_window",
        stem + b".expert_gating_func",
        b"tokenizer.chat_template",
    ))  # fmt: skip


def _nested(rng: random.Random, source: Source) -> tuple[str, bytes]:
    file = source.file.fresh()
    if rng.random() < 0.5:
        alignment = rng.choice((0, 1, 2, 3, 7, 8, 16, 64, 4096, 2**20, 2**31))
        file.fields.append(
            replace(file.fields[0], key=b"general.alignment", kind=4, value=alignment)
        )
        return f"alignment {alignment}", serialise(file)
    depth = rng.choice((1, 3, 4, 5, 50, 5000))
    raw = struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQI", 4, 1, 1)
    file.fields.append(replace(file.fields[0], key=b"x.nested", kind=9, value=raw))
    return f"nested {depth}", serialise(file)


def _tensor(rng: random.Random, source: Source) -> tuple[str, bytes]:
    file = source.file.fresh()
    place = rng.randrange(len(file.tensors))
    tensor = file.tensors[place]
    name, action = tensor.name.decode(), rng.randrange(6)
    if action == 0:
        del file.tensors[place]
        return f"{name} missing", serialise(file)
    if action == 1:
        other = rng.choice(
            (tensor.name, b"", b"\xff", rng.choice(file.tensors).name, b"rope_freqs.weight")
        )
        file.tensors.append(replace(tensor, name=other))
        return f"{name} again as {other!r}", serialise(file)
    made = _changed_tensor(rng, tensor, len(file.data), action)
    file.tensors[place] = made
    if action == 5:
        swapped = rng.randrange(len(file.tensors))
        file.tensors[place], file.tensors[swapped] = (
            replace(tensor, name=file.tensors[swapped].name),
            replace(file.tensors[swapped], name=tensor.name),
        )
    return f"{tensor} -> {made}", serialise(file)


def _changed_tensor(rng: random.Random, tensor: Tensor, size: int, action: int) -> Tensor:
    shape = list(tensor.shape)
    if action == 2:
        return replace(tensor, kind=rng.choice((*range(45), 2**31, 2**32 - 1)))
    if action == 3:
        near = tensor.offset + rng.choice((-32, -1, 1, 2, 16, 32))
        return replace(
            tensor, offset=rng.choice((*_OFFSETS, max(0, near), max(0, near), size, size - 1))
        )
    if action == 4:
        axis, by = rng.randrange(len(shape)), rng.choice((-1, 1, 32))
        longer = [*shape[:axis], max(0, shape[axis] + by), *shape[axis + 1 :]]
        choices = (
            [],
            [*shape, 1],
            [1, *shape],
            shape[::-1],
            [0, *shape[1:]],
            [2**63, *shape[1:]],
            [2**32, 2**32],
        )
        flat = [math.prod(shape)]
        return replace(
            tensor, shape=tuple(rng.choice((*choices, longer, longer, flat, [*shape, 1, 1, 1])))
        )
    return replace(tensor, dimensions=rng.choice((None, 0, 5, 2**32 - 1)))


def _data(rng: random.Random, source: Source) -> tuple[str, bytes]:
    file = source.file.fresh()
    tensor = rng.choice(file.tensors)
    end = min(
        (other.offset for other in file.tensors if other.offset > tensor.offset),
        default=len(file.data),
    )
    size, fill = end - tensor.offset, rng.choice((*_FILLS, b""))
    filled = (fill * (size // len(fill) + 1))[:size] if fill else rng.randbytes(size)
    file.data = file.data[: tensor.offset] + filled + file.data[end:]
    return f"{tensor.name.decode()} filled with {fill!r}", serialise(file)


def _flipped(rng: random.Random, source: Source) -> tuple[str, bytes]:
    made = bytearray(source.raw)
    in_header = rng.random() < 0.8
    places = range(source.header) if in_header else range(source.header, len(made))
    count = rng.choice((1, 1, 2, 8)) if in_header else 50
    for _ in range(count):
        made[rng.choice(places)] = rng.choice((0, 1, 255, 127, 128, rng.randrange(256)))
    return f"{count} bytes of the {'header' if in_header else 'data'} changed", bytes(made)
