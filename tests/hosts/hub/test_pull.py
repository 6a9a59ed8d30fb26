"""`hybrimoe pull` against a stand-in for the hub, in processes of its own as the hub's library
reads its settings once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.hub.stand_in import COMMIT, StandIn, serve

DATA = bytes(range(256)) * 4096


class Hub:
    """The stand-in, and a user of it."""

    def __init__(self, stand_in: StandIn, address: str, home: Path) -> None:
        self.stand_in = stand_in
        self.home = home
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def pull(self, name: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("pull", name, **env)

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hybrimoe_plugin", *words]
        return subprocess.run(
            command, capture_output=True, text=True, env={**self._env, **env}, timeout=120
        )

    def refusal(self, name: str, **env: str) -> str:
        done = self.pull(name, **env)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        return done.stderr


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve() as (stand_in, address):
        yield Hub(stand_in, address, tmp_path / "home")


def test_a_split_model_is_fetched_whole_and_once(hub: Hub) -> None:
    parts = {f"Q8_0/a-Q8_0-0000{part}-of-00002.gguf": DATA + bytes([part]) for part in (1, 2)}
    hub.stand_in.files["org/name"] = {"a-Q4_K_M.gguf": b"other", **parts}
    done = hub.pull("org/name:Q8_0")
    assert done.returncode == 0, done.stderr
    first = Path(done.stdout.strip())
    assert first.name == "a-Q8_0-00001-of-00002.gguf"
    assert COMMIT in first.parts and first.is_relative_to(hub.home)
    assert [path.read_bytes() for path in sorted(first.parent.iterdir())] == list(parts.values())
    assert "fetching 2 files, 2.0 MiB" in done.stderr
    assert f"hybrimoe local_chat --gguf_path {first}" in done.stderr
    assert hub.stand_in.fetched() == list(parts)

    again = hub.pull("org/name:Q8_0")
    assert again.stdout == done.stdout and "fetching" not in again.stderr
    assert hub.stand_in.fetched() == list(parts)


def test_a_cut_connection_is_taken_up_where_it_broke(hub: Hub) -> None:
    # The library writes in pieces of 10 MiB.
    hub.stand_in.files["org/name"] = {"a.gguf": DATA * 12}
    hub.stand_in.cut["a.gguf"] = 11 << 20
    done = hub.pull("org/name")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == DATA * 12
    spans = [span for method, path, span in hub.stand_in.requests if method == "GET"]
    assert spans[-1] is not None and spans[-1].startswith(f"bytes={10 << 20}-")


def test_a_checkpoint_is_a_directory(hub: Hub) -> None:
    needed = {"config.json": b"{}", "model.safetensors": DATA, "tokenizer.json": b"{}"}
    hub.stand_in.files["org/name"] = {**needed, "original/model.safetensors": DATA}
    done = hub.pull("org/name")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert {path.name for path in folder.iterdir()} == set(needed)
    assert f"--model_path {folder}" in done.stderr


def test_what_cannot_be_fetched_is_said(hub: Hub) -> None:
    hub.stand_in.files["org/name"] = {"a.gguf": DATA}
    assert "the hub has no model org/other" in hub.refusal("org/other")
    assert "HF_HUB_OFFLINE" in hub.refusal("org/name", HF_HUB_OFFLINE="1")
    assert "cannot be reached" in hub.refusal("org/name", HF_ENDPOINT="http://127.0.0.1:9")
    hub.stand_in.status = (403, "GatedRepo")
    assert "gated: accept its terms" in hub.refusal("org/name")
    assert hub.stand_in.fetched() == []


def test_a_full_disk_and_hostile_lists_are_noticed_before(hub: Hub) -> None:
    hub.stand_in.files["org/name"] = {"a.gguf": DATA}
    hub.stand_in.listed["org/name"] = [{"rfilename": "a.gguf", "size": 1 << 43}]
    assert "8.0 TiB more" in hub.refusal("org/name")
    hub.stand_in.listed["org/name"] = [{"rfilename": "../../a.gguf", "size": 1}]
    assert "no plain path" in hub.refusal("org/name")
    assert hub.stand_in.fetched() == []


def test_a_name_in_the_place_of_a_path(hub: Hub) -> None:
    """Fetched once; from then on it is found offline."""
    hub.stand_in.files["org/name"] = {"a-Q4_K_M.gguf": DATA, "a-Q8_0.gguf": DATA}
    name = ("explain", "--gguf_path", "org/name:Q8_0")
    offline = hub.run(*name, HF_HUB_OFFLINE="1")
    assert "neither a path nor in the hub's cache" in offline.stderr
    for env, is_fetched in (({}, True), ({}, False), ({"HF_HUB_OFFLINE": "1"}, False)):
        done = hub.run(*name, **env)
        # The content is no model.
        assert "a-Q8_0.gguf: not a GGUF file" in done.stderr
        assert ("fetching 1 file" in done.stderr) == is_fetched
    assert hub.stand_in.fetched() == ["a-Q8_0.gguf"]
