"""Write the synthetic model's file while other stages run."""

from __future__ import annotations

import time
from collections.abc import Iterator

from eval.gpu_check.check_model import model_file
from eval.gpu_check.place import Place, Row


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    started = time.perf_counter()
    path = model_file(place)
    size = path.stat().st_size / 1e9
    yield {
        "case": "model file",
        "gb": size,
        "write_s": time.perf_counter() - started,
        "detail": path.name,
    }
