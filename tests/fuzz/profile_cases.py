"""Damaged and hostile machine profiles, used to schedule an answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from hybrimoe_plugin.replay.profile_files import shipped
from tests.fuzz.json_values import changed, hurt
from tests.fuzz.models import Chat


def cases(
    rng: random.Random, folder: Path, models: dict[str, Path]
) -> Iterator[tuple[str, Callable[[], int | None]]]:
    """(what was done, a call that tries it), without end."""
    profiles = [json.loads(found.read_text("utf-8")) for found in shipped().values()]
    path = folder / "profile.json"
    while True:
        value = rng.choice(profiles)
        for _ in range(rng.choice((1, 1, 3))):
            value = changed(rng, value)
        raw = json.dumps(value).encode()
        raw = hurt(rng, raw) if rng.random() < 0.2 else raw
        path.write_bytes(raw)
        flags = ("--accelerator", "emulated", "--cache_ratio", "0.5", "--profile", str(path))
        yield (
            raw[:2000].decode("utf-8", "replace"),
            Chat("--gguf_path", str(models["mixtral"]), *flags),
        )
