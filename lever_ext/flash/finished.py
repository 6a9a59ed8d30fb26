"""What a directory already holds, before a pack is written there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import FlashError
from lever_ext.flash.dtype_choice import AUTO
from lever_ext.flash.format import PACK_NAME, Index
from lever_ext.flash.pack import FlashPack
from lever_ext.flash.source import TensorSource

log = logging.getLogger(__name__)


def source_key(source: TensorSource, config: Mapping[str, Any]) -> str:
    """Identity of the weights and config that a pack is made from, as hex digits."""
    text = json.dumps([source.identity, dict(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def finished_pack(directory: str | Path, source: str, dtype: str) -> Path | None:
    """The pack of the same model in a directory; None where a pack can be written.

    Args:
        directory: may be missing.
        source: `source_key` of the model that is to be packed.
        dtype: asked for.

    Raises:
        FlashError: there is a pack of another model, of another type, or by an earlier version,
            which does not say what it was made from; or a file of that name that cannot be read.
    """
    path = Path(directory) / PACK_NAME
    if not path.exists():
        return None
    try:
        index = _index(path)
    except FlashError as error:
        raise FlashError(
            f"{error}. It is not replaced unasked: choose another directory, or give --force "
            f"(force=True)"
        ) from error
    if not index.source or index.source != source:
        other = "another model, or other files of it" if index.source else "an unknown model"
        raise FlashError(
            f"{path}: there is a pack of {other}; choose another directory, or replace it by "
            f"--force (force=True)"
        )
    if dtype not in (AUTO, index.dtype):
        raise FlashError(
            f"{path}: there is a pack of this model in {index.dtype}, asked was {dtype}; choose "
            f"another directory, or replace it by --force (force=True)"
        )
    log.warning(
        "%s: there is a pack of this model already, in %s: its weights are kept (--force, or "
        "force=True, packs them again)",
        path,
        index.dtype,
    )
    return path


def holds_another(directory: str | Path, source: str) -> bool:
    """Whether a directory holds a pack that is not known to be of this model.

    Args:
        directory: may be missing.
        source: `source_key` of the model.
    """
    path = Path(directory) / PACK_NAME
    if not path.exists():
        return False
    try:
        return _index(path).source != source
    except FlashError:
        return True


def _index(path: Path) -> Index:
    """The index of a pack. Raises: FlashError: it cannot be read."""
    pack = FlashPack.open(path, threads=1)
    pack.close()
    return pack.index
