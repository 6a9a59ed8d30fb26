"""The GGML types that have Triton kernels: one description of each.

The kernels' code (`codes`, `scales`) and the slots' layout are made of these. Blocks as GGML has
them: https://github.com/ggml-org/ggml, src/ggml-common.h; how they become values in torch is in
`weights.dequant`.
"""

from __future__ import annotations

from typing import NamedTuple

_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice what the codes of such a float without its sign stand for."""
_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Format(NamedTuple):
    """How one type stores a row: blocks of `values` values, `w = scale * code - minimum`."""

    values: int
    """Of a block; a matrix has a multiple of it in each row."""
    fields: tuple[tuple[str, int], ...]
    """(name, bytes) of what a block holds, in stored order."""
    planar: bool = True
    """Whether a slot keeps each field in a plane of its own (`layout`)."""
    code: str = "nibbles"
    """The field with the codes, or with their lower bits: nibbles, pairs, bytes or floats;
    or "grid": codes stand for entries of a grid, and their fields are like no other type's."""
    upper: str = ""
    """The field with the codes' upper bits: bits or pairs."""
    zero: int = 0
    """The code that stands for 0."""
    points: tuple[int, ...] = ()
    """Sixteen int8 values for which the codes stand, where they are no numbers themselves."""
    e2m1: bool = False
    """Whether codes of 4 bits are floats themselves: sign 1, exponent 2, mantissa 1."""
    entries: int = 0
    """Of the type's grid; 0 for none."""
    entry_values: int = 0
    """int8 values of each."""
    step: int = 32
    """Columns from a lane's low column to its high one (`codes`)."""
    scales: str = "half"
    """What has a scale of its own: a half of 16 low and of 16 high columns, each 32 columns of a
    unit, or nothing ("")."""

    @property
    def block_bytes(self) -> int:
        return sum(size for _, size in self.fields)

    @property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """(offset in the block, bytes) of each plane in slot order: larger ones first.

        So each plane starts at a multiple of its own size if the matrix does at one of the largest.
        Empty where blocks stay as they are.
        """
        if not self.planar:
            return ()
        return tuple((self.offset(name), size) for name, size in self._in_slot_order())

    @property
    def minima(self) -> bool:
        """Whether there are minima beside the scales."""
        return any(name in ("m", "dmin") for name, _ in self.fields)

    @property
    def integers(self) -> bool:
        """Whether codes stand for small integers: int8 activations then give integer sums."""
        return self.code in ("nibbles", "pairs", "bytes")

    def size(self, field: str) -> int:
        """Bytes of a field in one block."""
        return dict(self.fields)[field]

    def offset(self, field: str) -> int:
        """Bytes from a block's start to a field."""
        names = [name for name, _ in self.fields]
        return sum(size for _, size in self.fields[: names.index(field)])

    def start(self, field: str, values: int) -> int:
        """Bytes from the start of a matrix of so many values, in its slot, to the first block's."""
        if not self.planar:
            return self.offset(field)
        order = self._in_slot_order()
        names = [name for name, _ in order]
        return values // self.values * sum(size for _, size in order[: names.index(field)])

    def stride(self, field: str) -> int:
        """Bytes in a slot from one block's field to the next one's."""
        return self.size(field) if self.planar else self.block_bytes

    @property
    def int8_points(self) -> tuple[int, ...]:
        """`points`, or twice the floats that e2m1 codes are."""
        return (*_E2M1, *(-point for point in _E2M1)) if self.e2m1 else self.points

    def points_word(self, upper: bool) -> int:
        """Eight of the points in one 64-bit word, the first one in its lowest byte."""
        points = self.int8_points
        half = points[8:] if upper else points[:8]
        return int.from_bytes(bytes(point & 255 for point in half), "little")

    def _in_slot_order(self) -> list[tuple[str, int]]:
        return sorted(self.fields, key=lambda field: -field[1])


_D = ("d", 2)
_K = (_D, ("dmin", 2), ("scales", 12))
_NIBBLES = ("nibbles", 16)

FORMATS: dict[str, Format] = {
    "Q4_K": Format(256, (*_K, ("nibbles", 128)), planar=False, scales="unit"),
    "Q5_K": Format(
        256,
        (*_K, ("bits", 32), ("nibbles", 128)),
        planar=False,
        upper="bits",
        scales="unit",
    ),
    "Q6_K": Format(
        256,
        (("nibbles", 128), ("pairs", 64), ("scales", 16), _D),
        upper="pairs",
        zero=32,
        step=64,
    ),
    "Q8_0": Format(32, (_D, ("bytes", 32)), code="bytes", scales="unit"),
    "Q4_0": Format(32, (_D, _NIBBLES), zero=8, step=16),
    "BF16": Format(1, (("value", 2),), planar=False, code="floats", scales=""),
    "F16": Format(1, (("value", 2),), planar=False, code="floats", scales=""),
    "MXFP4": Format(32, (("exponent", 1), _NIBBLES), e2m1=True, step=16),
    "IQ4_NL": Format(32, (_D, _NIBBLES), points=_NON_LINEAR, step=16),
    "IQ4_XS": Format(
        256,
        (_D, ("scales_upper", 2), ("scales_lower", 4), ("nibbles", 128)),
        points=_NON_LINEAR,
        step=16,
    ),
    "Q4_1": Format(32, (_D, ("m", 2), _NIBBLES), step=16),
    "Q5_0": Format(32, (_D, ("bits", 4), _NIBBLES), upper="bits", zero=16, step=16),
    "Q5_1": Format(32, (_D, ("m", 2), ("bits", 4), _NIBBLES), upper="bits", step=16),
    "Q2_K": Format(256, (("scales", 16), ("pairs", 64), _D, ("dmin", 2)), code="pairs"),
    "Q3_K": Format(
        256,
        (("bits", 32), ("pairs", 64), ("scales_lower", 8), ("scales_upper", 4), _D),
        code="pairs",
        upper="bits",
        zero=4,
    ),
    "IQ2_XXS": Format(256, (_D, ("parts", 64)), code="grid", entries=256, entry_values=8),
    "IQ2_XS": Format(
        256, (_D, ("codes", 64), ("scales", 8)), code="grid", entries=512, entry_values=8
    ),
    "IQ2_S": Format(
        256,
        (_D, ("codes", 32), ("signs", 32), ("code_bits", 8), ("scales", 8)),
        code="grid",
        entries=1024,
        entry_values=8,
    ),
    "IQ3_XXS": Format(
        256, (_D, ("codes", 64), ("words", 32)), code="grid", entries=256, entry_values=4
    ),
    "IQ3_S": Format(
        256,
        (_D, ("codes", 64), ("code_bits", 8), ("signs", 32), ("scales", 4)),
        code="grid",
        entries=512,
        entry_values=4,
    ),
    "IQ1_S": Format(
        256, (_D, ("codes", 32), ("words", 16)), code="grid", entries=2048, entry_values=8
    ),
    "IQ1_M": Format(
        256,
        (("codes", 32), ("code_bits", 16), ("scales", 8)),
        code="grid",
        entries=2048,
        entry_values=8,
    ),
}
"""Q4_K and Q5_K blocks have 16-byte aligned codes, so they stay as they are."""

SUPPORTED = tuple(FORMATS)

INTEGERS = tuple(kind for kind, described in FORMATS.items() if described.integers)
"""Types whose decode kernels can take int8 activations."""

POINTED = tuple(kind for kind, described in FORMATS.items() if described.int8_points)
"""Types whose codes stand for points, in the order in which these lie in memory."""
POINT_COPIES = 32
"""Of each type's points: one for each thread of a warp."""
POINT_STARTS = {kind: place * POINT_COPIES * 16 for place, kind in enumerate(POINTED)}
"""Bytes before each type's points."""

GRIDS = tuple(kind for kind, described in FORMATS.items() if described.entries)
"""Types with a grid, in the order in which the grids lie one after another in memory."""


def _grid_starts() -> dict[str, int]:
    """Bytes before each type's grid."""
    starts = {}
    end = 0
    for kind in GRIDS:
        starts[kind] = end
        end += FORMATS[kind].entries * FORMATS[kind].entry_values
    return starts


GRID_STARTS = _grid_starts()
