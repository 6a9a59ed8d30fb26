"""What the operations take: the structures of native.h and its sources, field by field."""

from __future__ import annotations

import ctypes

_Pointer = ctypes.c_void_p
_Int64 = ctypes.c_int64


class Operation(ctypes.Structure):
    """What a graph does at one step, in so many chunks."""

    _fields_ = [("run", _Pointer), ("chunks", _Int64), ("data", _Pointer)]


class GraphOf(ctypes.Structure):
    """Operations that run one after the other."""

    _fields_ = [("operations", _Pointer), ("count", _Int64)]


class Kind(ctypes.Structure):
    """A type of weights: ggml's functions for it, and its blocks."""

    _fields_ = [
        ("dot", _Pointer),
        ("dequantise", _Pointer),
        ("dots", _Pointer),
        ("panel", _Pointer),
        ("block", _Int64),
        ("block_bytes", _Int64),
    ]


class Product(ctypes.Structure):
    """out [T, N] = x [T, M] times weights [N, M]."""

    _fields_ = [
        ("kind", _Pointer),
        ("weights", _Pointer),
        ("weights_stride", _Int64),
        ("x", _Pointer),
        ("x_stride", _Int64),
        ("out", _Pointer),
        ("out_stride", _Int64),
        ("rows", _Int64),
        ("count", _Int64),
        ("columns", _Int64),
        ("first_chunk", _Int64),
        ("chunk_rows", _Int64),
    ]


class Products(ctypes.Structure):
    """Products that are one operation."""

    _fields_ = [("products", _Pointer), ("count", _Int64)]


class Conversion(ctypes.Structure):
    """Rows of activations, as the products of a type take them."""

    _fields_ = [
        ("convert", _Pointer),
        ("x", _Pointer),
        ("x_stride", _Int64),
        ("out", _Pointer),
        ("out_stride", _Int64),
        ("rows", _Int64),
        ("columns", _Int64),
    ]


class Pointing(ctypes.Structure):
    """Lets products read the matrices of the chosen experts."""

    _fields_ = [
        ("ids", _Pointer),
        ("addresses", _Pointer),
        ("products", _Pointer),
        ("count", _Int64),
    ]


class Tiling(ctypes.Structure):
    """Rows of activations, as products by tiles take them."""

    _fields_ = [
        ("x", _Pointer),
        ("x_stride", _Int64),
        ("places", _Pointer),
        ("firsts", _Pointer),
        ("counts", _Pointer),
        ("out", _Pointer),
        ("rows", _Int64),
        ("columns", _Int64),
    ]


class Rows(ctypes.Structure):
    """An operation on rows of one or two arguments."""

    _fields_ = [
        ("out", _Pointer),
        ("x", _Pointer),
        ("y", _Pointer),
        ("rows", _Int64),
        ("width", _Int64),
        ("x_stride", _Int64),
        ("y_stride", _Int64),
        ("out_stride", _Int64),
        ("number", ctypes.c_float),
    ]


class LookUp(ctypes.Structure):
    """Rows of a matrix, dequantised."""

    _fields_ = [
        ("kind", _Pointer),
        ("weights", _Pointer),
        ("weights_stride", _Int64),
        ("columns", _Int64),
        ("ids", _Pointer),
        ("out", _Pointer),
    ]


class WeightedSum(ctypes.Structure):
    """Each token's sum over its choices."""

    _fields_ = [
        ("weights", _Pointer),
        ("values", _Pointer),
        ("places", _Pointer),
        ("out", _Pointer),
        ("top_k", _Int64),
        ("width", _Int64),
    ]


class Attention(ctypes.Structure):
    """One token's attention over a cache with its new entry."""

    _fields_ = [
        ("query", _Pointer),
        ("key", _Pointer),
        ("value", _Pointer),
        ("keys", _Pointer),
        ("values", _Pointer),
        ("key_head_stride", _Int64),
        ("key_stride", _Int64),
        ("value_head_stride", _Int64),
        ("value_stride", _Int64),
        ("held", _Int64),
        ("key_heads", _Int64),
        ("group", _Int64),
        ("width", _Int64),
        ("value_width", _Int64),
        ("block", _Int64),
        ("parts", _Pointer),
        ("out", _Pointer),
        ("scaling", ctypes.c_float),
    ]


class Rotation(ctypes.Structure):
    """The rotary embedding of heads."""

    _fields_ = [
        ("x", _Pointer),
        ("out", _Pointer),
        ("x_stride", _Int64),
        ("out_stride", _Int64),
        ("first", _Pointer),
        ("second", _Pointer),
        ("by_first", _Pointer),
        ("by_second", _Pointer),
        ("width", _Int64),
    ]


class Choice(ctypes.Structure):
    """A router's choice of experts for one token."""

    _fields_ = [
        ("logits", _Pointer),
        ("correction", _Pointer),
        ("scores", _Pointer),
        ("ids", _Pointer),
        ("weights", _Pointer),
        ("experts", _Int64),
        ("top_k", _Int64),
        ("is_sigmoid", _Int64),
        ("is_normalised", _Int64),
        ("scale", ctypes.c_float),
    ]
