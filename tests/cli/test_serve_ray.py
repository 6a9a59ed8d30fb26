"""`hybrimoe serve --ray`: which flags reach Ray, and what a replica makes of them. Without Ray."""

from __future__ import annotations

import argparse
import asyncio
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from light_server import put_in_place

from hybrimoe_plugin.cli import models
from hybrimoe_plugin.cli.chat import banner
from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.cli.serve import command, flags, ray_app
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.serve.scaling import in_process, launch
from hybrimoe_plugin.serve.scaling.messages import Call, Start


class Cluster:
    """Stands in for Ray, and records what it is given."""

    def __init__(self) -> None:
        self.address: str | None = "none"
        self.listens: tuple[str, int] = ("", 0)
        self.maker: Any = None
        self.front: Any = None
        self.scale: Any = None

    @contextmanager
    def connect(self, address: str | None) -> Iterator[None]:
        self.address = address
        yield

    def application(self, maker: Any, front: Any, scale: Any) -> str:
        self.maker, self.front, self.scale = maker, front, scale
        return "application"

    def run(self, make: Callable[[], Any], host: str, port: int, ready: Callable[[], None]) -> None:
        self.listens = (host, port)
        make()
        ready()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(launch, "Cluster", found.connect)
    monkeypatch.setattr(launch, "application", found.application)
    monkeypatch.setattr(launch, "run", found.run)
    monkeypatch.setattr(models, "demo_gguf", lambda form: Path(f"{form}.gguf"))
    monkeypatch.delenv(flags.KEY_VARIABLE, raising=False)
    return found


def serve(text: str = "") -> int:
    return main(["serve", "--ray", "--port", "0", *shlex.split(text)])


def test_the_scale_follows_the_flags(cluster: Cluster) -> None:
    given = "--replicas 2 --max_replicas 5 --max_batch 4 --max_queue 9 --shutdown_seconds 7"
    assert serve(given) == 0
    scale = cluster.scale
    assert (scale.replicas, scale.max_replicas) == (2, 5)
    assert (scale.requests, scale.target, scale.queue, scale.drain_s) == (8, 4, 9, 7.0)


def test_the_ingress_lets_in_what_the_flags_say(cluster: Cluster) -> None:
    assert serve("--api_key k --cors '*' --max_body_bytes 5KiB --wait_seconds 3") == 0
    front = cluster.front
    assert (front.body_bytes, front.wait_s) == (5120, 3.0)
    access = front.access
    assert (access.host, access.keys, access.origins) == ("127.0.0.1", ("k",), ("*",))


def test_it_says_where_it_listens_when_all_answer(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve("--ray_address far:6379") == 0
    assert cluster.address == "far:6379"
    host, port = cluster.listens
    assert port > 0
    assert capsys.readouterr().out == f"http://{host}:{port}\n"


def test_paths_mean_the_same_in_other_folders(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert serve("m.gguf") == 0
    assert cluster.maker.arguments.gguf_path == str(tmp_path / "m.gguf")


def test_rays_own_tools_take_the_same_flags(cluster: Cluster) -> None:
    built = ray_app.app({"gguf_path": "m.gguf", "max-batch": 3, "quiet": "True"})
    assert built == "application"
    assert cluster.scale.requests == 6
    assert cluster.front.access.host is None  # where Ray listens is not known here
    with pytest.raises(ConfigError, match="max_bach"):
        ray_app.app({"max_bach": 3})


def test_without_ray_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert serve() == 2
    assert "pip install 'ktransformers-hybrimoe[ray]'" in capsys.readouterr().err


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a model is loaded with, and `closed` when its scheduler is."""
    found: dict[str, Any] = {}

    def load_model(*_paths: Any, **settings: Any) -> tuple[Any, str]:
        found.update(settings)
        return SimpleNamespace(hybrimoe=SimpleNamespace(stats=Counters, engines=())), "tokenizer"

    scheduler = SimpleNamespace(
        together=True, context=9, failed=None, close=lambda seconds: found.update(closed=True)
    )
    put_in_place(monkeypatch, load_model)
    monkeypatch.setattr(banner, "banner", lambda _model: [])
    monkeypatch.setattr(command, "make_scheduler", lambda _loaded, **_options: scheduler)
    monkeypatch.setattr("hybrimoe_plugin.cli.chat.loading.piece", lambda *_: 512)
    return found


def arguments(cluster: Cluster, text: str) -> argparse.Namespace:
    """What Ray would hand to the replicas."""
    assert serve(text) == 0
    found: argparse.Namespace = cluster.maker.arguments
    return found


@pytest.mark.parametrize(
    ("given", "threads"), [("", 3), ("--cpu_threads 5", 5), ("--cpu_infer 5", 5)]
)
def test_a_replicas_threads_are_its_share_unless_given(
    cluster: Cluster, loaded: dict[str, Any], given: str, threads: int
) -> None:
    with command.replica(arguments(cluster, given), 3):
        assert loaded["cpu_threads"] == threads


def test_rays_own_tools_make_the_same_replicas(cluster: Cluster, loaded: dict[str, Any]) -> None:
    ray_app.app({"gguf_path": "m.gguf"})
    with command.replica(cluster.maker.arguments, 3):
        assert loaded["cpu_threads"] == 3


def test_a_replica_answers_without_a_key_and_closes_its_scheduler(
    cluster: Cluster, loaded: dict[str, Any]
) -> None:
    async def ask(app: Any) -> Any:
        health = Call("GET", "/v1/models", b"", ((b"host", b"any"),), b"")
        return [part async for part in in_process.answer(app, health)]

    with command.replica(arguments(cluster, "--api_key k"), 3) as app:
        start, *_ = asyncio.run(ask(app))
        assert isinstance(start, Start)
        assert start.status == 200
        assert "closed" not in loaded
    assert loaded["closed"]
