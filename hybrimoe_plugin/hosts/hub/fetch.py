"""Fetch a model from the Hugging Face hub into the hub's own cache.

`huggingface_hub` does the work, so HF_TOKEN, HF_HOME and HF_ENDPOINT mean what they mean elsewhere.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.files import human, one_line
from hybrimoe_plugin.hosts.hub.choice import Asked, Choice, HubFile, checked_files, choose, parse
from hybrimoe_plugin.hosts.hub.kept import kept_model

_SPARE_BYTES = 1 << 28
"""Of the disk, left free."""
_SECONDS = 30.0
"""To wait for the list of files."""


def pull(name: str, about: Callable[[str], object] = lambda _: None) -> Path:
    """Fetch the files of `ORG/REPO[:QUANTISATION or FILE]` that are not in the cache yet.

    Args:
        about: called with one line before a download begins: what comes, and its size.

    Returns:
        the GGUF file (the first of a split one), or the directory of a safetensors checkpoint.

    Raises:
        ConfigError: no such name or repository, it is not open to this user, the name fits several
            models, or HF_HUB_OFFLINE is set.
        WeightsError: the hub cannot be reached, the disk has too little space, or the repository
            is damaged.
    """
    from huggingface_hub import constants

    asked = parse(name)
    if constants.is_offline_mode():
        raise ConfigError(
            f"{asked.repository} cannot be fetched: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
        )
    with _plain_errors(asked):
        commit, files = _list(asked)
        choice = choose(asked, files)
        cache = Path(constants.HF_HUB_CACHE)
        missing = [file for file in choice.files if not _is_kept(asked, file, commit)]
        _check_space(missing, cache)
        if missing:
            total = sum(file.nbytes for file in missing)
            count = "1 file" if len(missing) == 1 else f"{len(missing)} files"
            about(f"fetching {count}, {human(total)}, of {asked.repository} into {cache}")
        return _fetch(asked, choice, commit)


def find_model(
    name: str, about: Callable[[str], object] = lambda _: None, *, may_fetch: bool
) -> Path:
    """The path of a model in the hub's cache; fetched first if it is not there. Raises as `pull`.

    Args:
        may_fetch: whether it may be fetched, even though the library was told to stay offline.
    """
    from huggingface_hub import constants

    asked = parse(name)
    kept = kept_model(asked, Path(constants.HF_HUB_CACHE))
    if kept is not None:
        return kept
    if not may_fetch:
        raise ConfigError(
            f"{name} is neither a path nor in the hub's cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: without it, hybrimoe pull fetches it"
        )
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = False
    try:
        return pull(name, about)
    finally:
        constants.HF_HUB_OFFLINE = before


def _list(asked: Asked) -> tuple[str, list[HubFile]]:
    """The commit, and its files."""
    from huggingface_hub import HfApi

    info: Any = HfApi().model_info(asked.repository, files_metadata=True, timeout=_SECONDS)
    commit = info.sha
    if not isinstance(commit, str) or not commit.isalnum() or len(commit) > 64:
        raise WeightsError(f"{asked.repository}: the hub names no commit")
    pairs = ((file.rfilename, file.size) for file in info.siblings or ())
    return commit, checked_files(pairs)


def _is_kept(asked: Asked, file: HubFile, commit: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(asked.repository, file.name, revision=commit), str)


def _check_space(missing: list[HubFile], cache: Path) -> None:
    """Before anything is fetched, not after the first hundred gigabytes.

    Raises:
        WeightsError: the disk has too little space.
    """
    total = sum(file.nbytes for file in missing)
    there = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if total and total + _SPARE_BYTES > free:
        raise WeightsError(
            f"the model needs {human(total)} more and {cache} has {human(free)} free: make room, "
            "choose a smaller quantisation, or let HF_HOME name a folder on another disk"
        )


def _fetch(asked: Asked, choice: Choice, commit: str) -> Path:
    """One by one, so that an interruption costs one file at most."""
    from huggingface_hub import hf_hub_download

    paths = [
        Path(hf_hub_download(asked.repository, file.name, revision=commit)) for file in choice.files
    ]
    for file, path in zip(choice.files, paths, strict=True):
        if path.stat().st_size != file.nbytes:
            raise WeightsError(
                f"{path}: has {path.stat().st_size} bytes and should have {file.nbytes}: remove it "
                "and pull again"
            )
    return paths[0].parent if choice.is_directory else paths[0]


@contextlib.contextmanager
def _plain_errors(asked: Asked) -> Iterator[None]:
    """Turn the library's errors into ours."""
    from huggingface_hub import errors

    name = asked.repository
    # Of httpx, or of httpx2 in later versions of the library.
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.GatedRepoError:
        raise ConfigError(
            f"{name} is gated: accept its terms on its page at the hub, then set HF_TOKEN to a "
            "token of yours, or run hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"the hub has no model {name}, or keeps it private: check the name; for a private one "
            "set HF_TOKEN or run hf auth login"
        ) from None
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        hint = "; HF_TOKEN may be wrong" if code in (401, 403) else "; try again"
        raise WeightsError(f"{name}: the hub answered {code or one_line(str(error))}{hint}") from (
            error
        )
    except (errors.LocalEntryNotFoundError, http_error) as error:
        raise WeightsError(
            f"{name}: the hub cannot be reached or broke off ({type(error).__name__}); files that "
            "are complete are kept: run the same command again"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        # A full disk, or an answer that the library cannot read.
        raise WeightsError(f"{name}: cannot be fetched ({one_line(str(error))[:200]})") from error
