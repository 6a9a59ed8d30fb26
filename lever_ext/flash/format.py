"""The flash pack format, version 1.

One file, little-endian:

    0        header, 4096 bytes: magic "LEVERPAK", u32 version, u64 index offset, u64 index bytes,
             u32 CRC-32 of the index, u32 CRC-32 of all header fields before it; the rest is zero
    4096     blocks in the order of execution, each starting and ending at a multiple of 4096
    ...      index: UTF-8 JSON, at a multiple of 4096, the last thing in the file

A block is what one read fetches: a decoder layer without its routed experts, one routed expert, or
a part that is always resident (embedding, final norm, output head). Its tensors lie in it one after
another, each at a multiple of 64 bytes, row-major, in the model's own names and shapes; a routed
expert's tensors are rows of the stacked tensors that `transformers` names. The index holds the
model's config, a fingerprint, the identity of the packed files, and for every block its place,
CRC-32 and tensors.
The header is written last: a file without a valid header is not a pack.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybrimoe_plugin.errors import FlashError

PACK_NAME = "target.lever"
"""The pack's file in its directory."""
MAGIC = b"LEVERPAK"
VERSION = 1
ALIGNMENT = 4096
TENSOR_ALIGNMENT = 64
HEADER = struct.Struct("<8sIQQI")
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
KINDS = ("resident", "layer", "expert")
MOST_DIMENSIONS = 8
MAX_INDEX_BYTES = 1 << 24
"""A model of 61 layers with 256 experts each takes 7 MiB; what JSON is read into takes up to 20
times its length.
"""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor inside a block."""

    name: str
    """Qualified parameter name; an expert's tensor has the stacked parameter's name."""
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the block's start."""

    @property
    def nbytes(self) -> int:
        count = DTYPES[self.dtype]
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Block:
    """What one read fetches."""

    kind: str
    """One of `KINDS`."""
    layer: int
    """-1 for resident blocks."""
    expert: int
    """-1 but for routed experts."""
    offset: int
    nbytes: int
    crc: int
    tensors: tuple[PackedTensor, ...]

    @property
    def label(self) -> str:
        """For messages: `resident`, `layer 3` or `expert 3.7`."""
        if self.layer < 0:
            return self.kind
        if self.expert < 0:
            return f"{self.kind} {self.layer}"
        return f"{self.kind} {self.layer}.{self.expert}"


@dataclass(frozen=True)
class Index:
    """Everything about a pack but its weights."""

    config: Mapping[str, Any]
    """The model's `config.json`."""
    blocks: tuple[Block, ...]
    source: str = ""
    """Identity of what the pack was made from; empty in packs of earlier versions."""

    @property
    def dtype(self) -> str:
        """Stored type of the weights, which is the same for all."""
        return self.blocks[0].tensors[0].dtype

    @property
    def fingerprint(self) -> str:
        """Identity of the model: its config and its weights' checksums, as hex digits."""
        text = json.dumps(
            [dict(self.config), [asdict(block) for block in self.blocks]], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def to_bytes(self) -> bytes:
        body = {
            "config": dict(self.config),
            "blocks": [asdict(b) for b in self.blocks],
            "source": self.source,
            "fingerprint": self.fingerprint,
        }
        return json.dumps(body, sort_keys=True).encode()


def align(count: int, to: int = ALIGNMENT) -> int:
    """Round up to a multiple."""
    return -(-count // to) * to


def header_bytes(index_offset: int, index: bytes) -> bytes:
    """The header of a finished pack, 4096 bytes."""
    fields = HEADER.pack(MAGIC, VERSION, index_offset, len(index), zlib.crc32(index))
    return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(ALIGNMENT, b"\0")


def parse_header(data: bytes, size: int, where: str) -> tuple[int, int, int]:
    """(index offset, index bytes, CRC-32 of the index).

    Raises:
        FlashError: not a pack, not finished, of another version, damaged or truncated.
    """
    if len(data) < ALIGNMENT or data[:8] != MAGIC:
        raise FlashError(
            f"{where}: not a flash pack, or one that was never finished; make it with hybrimoe "
            f"flash_pack"
        )
    magic, version, offset, nbytes, crc = HEADER.unpack_from(data)
    if version != VERSION:
        raise FlashError(
            f"{where}: flash pack version {version}, this program reads {VERSION}; pack the model "
            f"again, with --force"
        )
    if struct.unpack_from("<I", data, HEADER.size)[0] != zlib.crc32(data[: HEADER.size]):
        raise FlashError(
            f"{where}: the pack's header is damaged; pack the model again, with --force"
        )
    if offset % ALIGNMENT or nbytes > MAX_INDEX_BYTES or offset + nbytes > size:
        raise FlashError(
            f"{where}: the pack is truncated: {size} bytes of {offset + nbytes}; pack the model "
            f"again, with --force"
        )
    return offset, nbytes, crc


def parse_index(data: bytes, crc: int, data_end: int, where: str) -> Index:
    """Read and check an index whose blocks must end at `data_end` at the latest.

    Raises:
        FlashError: damaged, or a block or tensor lies outside its place.
    """
    if zlib.crc32(data) != crc:
        raise FlashError(
            f"{where}: the pack's index is damaged; pack the model again, with --force"
        )
    try:
        body = json.loads(data)
        blocks = tuple(_block(entry) for entry in body["blocks"])
        index = Index(dict(body["config"]), blocks, str(body.get("source", "")))
        known = body["fingerprint"]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise FlashError(
            f"{where}: the pack's index makes no sense ({error}); pack the model again, with "
            f"--force"
        ) from None
    _check_places(index.blocks, data_end, where)
    if known != index.fingerprint:
        raise FlashError(
            f"{where}: the pack's fingerprint does not fit its index; pack the model again, with "
            f"--force"
        )
    return index


def _block(entry: Mapping[str, Any]) -> Block:
    tensors = tuple(
        PackedTensor(
            str(t["name"]), str(t["dtype"]), tuple(int(n) for n in t["shape"]), int(t["offset"])
        )
        for t in entry["tensors"]
    )
    numbers = {key: int(entry[key]) for key in ("layer", "expert", "offset", "nbytes", "crc")}
    return Block(str(entry["kind"]), tensors=tensors, **numbers)


def _check_places(blocks: Sequence[Block], data_end: int, where: str) -> None:
    """Raise FlashError unless every block follows the one before and holds its tensors."""
    if not blocks:
        raise FlashError(f"{where}: the pack holds no blocks; pack the model again, with --force")
    end = ALIGNMENT
    for block in blocks:
        sound = _is_sound(block) and block.offset == end
        end = block.offset + block.nbytes
        if not sound or end > data_end:
            raise FlashError(
                f"{where}: block {block.label} is empty or lies outside its place; pack the model "
                f"again, with --force"
            )


def _is_sound(block: Block) -> bool:
    """Whether a block is whole pages with tensors inside."""
    if block.kind not in KINDS or not block.tensors:
        return False
    if block.nbytes <= 0 or block.nbytes % ALIGNMENT:
        return False
    return all(_lies_inside(tensor, block) for tensor in block.tensors)


def _lies_inside(tensor: PackedTensor, block: Block) -> bool:
    if tensor.dtype not in DTYPES or len(tensor.shape) > MOST_DIMENSIONS:
        return False
    if tensor.offset < 0 or tensor.offset % TENSOR_ALIGNMENT:
        return False
    if any(size <= 0 for size in tensor.shape):
        return False
    return tensor.offset + tensor.nbytes <= block.nbytes
