"""Cache directories that cannot be written, are full or are not there at all: a notice, and the
program goes on.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_experts

from hybrimoe_plugin import cache_folder
from hybrimoe_plugin.cache_folder import cache_dir, place_for, spare_dir, usable_triton_cache
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.layout import slot_layout
from hybrimoe_plugin.compute.gpu.kernels.tuning import Tuned
from hybrimoe_plugin.demo import build as builder
from hybrimoe_plugin.demo import build_demo_model
from hybrimoe_plugin.errors import ConfigError, WeightsError

VARIABLES = (
    "HYBRIMOE_CACHE",
    "HYBRIMOE_PROFILES",
    "XDG_CACHE_HOME",
    "TRITON_CACHE_DIR",
    "TRITON_HOME",
)


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home and a folder for temporary files of the test's own, and no other setting."""
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    cache_folder._notice.cache_clear()
    yield
    cache_folder._notice.cache_clear()


def _unwritable(tmp_path: Path) -> str:
    """A folder that nobody can make, not even root: it would lie in a file."""
    (tmp_path / "file").touch()
    return str(tmp_path / "file" / "below")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, spare = tmp_path / "home", tmp_path / "temporary" / f"hybrimoe-cache-{os.getuid()}"
    assert cache_dir() == home / ".cache" / "hybrimoe"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/cache")
    assert cache_dir() == home / ".cache" / "hybrimoe"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/hybrimoe")
    monkeypatch.setenv("HYBRIMOE_CACHE", "here")
    assert cache_dir() == Path("here").absolute()
    for name in ("HYBRIMOE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "relative")
    assert cache_dir() == spare
    assert not spare.exists(), "asking makes nothing"


def test_a_large_file_goes_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert place_for("demo/x.gguf", 1) == cache_dir() / "demo" / "x.gguf"
    assert not caplog.records
    free = {str(cache_dir() / "demo"): 10 << 20}
    monkeypatch.setattr(
        cache_folder.shutil,
        "disk_usage",
        lambda path: SimpleNamespace(free=free.get(str(path), 1 << 40)),
    )
    assert place_for("demo/x.gguf", 20 << 20) == spare_dir() / "demo" / "x.gguf"
    assert "has 10 MiB free, 20 MiB are needed" in caplog.text
    free[str(spare_dir() / "demo")] = 5 << 20
    with pytest.raises(
        ConfigError, match="no place for demo/x.gguf.*10 MiB.*5 MiB.*HYBRIMOE_CACHE"
    ):
        place_for("demo/x.gguf", 20 << 20)


@pytest.mark.parametrize("how", ["others may write", "a link", "a file"])
def test_nothing_is_taken_from_a_folder_that_others_may_have_filled(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = tmp_path / "temporary" / f"hybrimoe-cache-{os.getuid()}"
    if how == "a file":
        spare.touch()
    else:
        theirs = tmp_path / "theirs" if how == "a link" else spare
        (theirs / "demo").mkdir(parents=True)
        (theirs / "demo" / "x.gguf").touch()
        theirs.chmod(0o777)
        if how == "a link":
            spare.symlink_to(theirs)
    monkeypatch.setenv("HYBRIMOE_CACHE", _unwritable(tmp_path))
    assert cache_folder.found("demo/x.gguf") is None
    with pytest.raises(ConfigError, match="no place for demo/x.gguf"):
        place_for("demo/x.gguf", 1)


@pytest.mark.parametrize("variable", ["HYBRIMOE_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_the_demo_model_is_built_elsewhere(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = []

    def write(form: str, path: Path, *_: Any) -> None:
        written.append(form)
        path.write_bytes(b"a model")

    monkeypatch.setenv(variable, _unwritable(tmp_path))
    monkeypatch.setattr(builder, "write_model", write)
    path = build_demo_model(progress=False)
    assert path.read_bytes() == b"a model" and path.is_relative_to(tmp_path / "temporary")
    assert f"cannot be written (Not a directory): {path.parent} is used instead" in caplog.text
    assert build_demo_model(progress=False) == path and written == ["mixtral"], "built once"


def test_a_demo_model_that_cannot_be_written_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(form: str, path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder, "write_model", write)
    with pytest.raises(
        WeightsError, match="cannot be written .No space left on device.*HYBRIMOE_CACHE"
    ):
        build_demo_model(progress=False)
    assert list((cache_dir() / "demo").iterdir()) == []


def test_tile_sizes_that_cannot_be_kept_are_used_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = slot_layout(tiny_experts.layer(types=("Q8_0",) * 3).spec, planar=True)
    blocks = Blocks.of(layout, 2)
    tuned = Tuned(Path(_unwritable(tmp_path)) / "sizes.json")
    tuned.put(layout, 2, blocks)
    assert tuned.get(layout, 2) == blocks
    assert "cannot keep the tuned tile sizes" in caplog.text


def test_triton_gets_a_folder_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable_triton_cache()
    assert "TRITON_CACHE_DIR" not in os.environ
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "HOME"):
        with monkeypatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", "")
            patch.setenv(name, _unwritable(tmp_path))
            usable_triton_cache()
            assert os.environ["TRITON_CACHE_DIR"] == str(spare_dir() / "hybrimoe-triton")


def test_the_spare_folder_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spare = spare_dir()
    assert cache_folder.folders() == [cache_dir(), spare]
    monkeypatch.setenv("HYBRIMOE_CACHE", str(spare))
    assert cache_folder.folders() == [spare]


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "file"
    cache_folder.write_atomic(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o664)
    cache_folder.write_atomic(path, "newer")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("newer", 0o664)
