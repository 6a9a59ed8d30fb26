"""The file format `hybrimoe-trace` 1.

A zip archive with `header.json`, the arrays of every chunk of calls, and `footer.json`. Members are
deflated, nothing else is compressed. Arrays are numpy files named `N/NAME` for chunk N:

    layer      [C] int16         position of each call's layer
    tokens     [C] int32         T of each call; R is their sum
    ids        [R, K] int16      chosen experts
    weights    [R, K] float16    their routing weights
    score_ids  [R, P] int16      experts with the P highest router scores; P = 0 without scores
    scores     [R, P] float16    these scores
    predicted  [R, D, K] int16   experts predicted for the next D layers, -1 where there is none

The R rows follow one another call by call. Chunks are written as the run goes, so memory does not
grow. `footer.json` comes last, so a file without it was cut off.
"""

from __future__ import annotations

import numpy as np

FORMAT, VERSION = "hybrimoe-trace", 1
HEADER, FOOTER = "header.json", "footer.json"
COLUMNS = {
    "layer": np.int16,
    "tokens": np.int32,
    "ids": np.int16,
    "weights": np.float16,
    "score_ids": np.int16,
    "scores": np.float16,
    "predicted": np.int16,
}


def is_trace(head: bytes) -> bool:
    """Whether a file that begins so is a trace: the header is the archive's first member."""
    return head.startswith(b"PK\x03\x04") and head[30:].startswith(HEADER.encode())
