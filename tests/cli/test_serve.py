"""`hybrimoe serve`: which flags reach what; what is wrong is refused before a model is loaded."""

from __future__ import annotations

import logging
import shlex
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from light_server import put_in_place

from hybrimoe_plugin.cli import models
from hybrimoe_plugin.cli.chat import banner, loading
from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.cli.serve import command, flags, libraries
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.serve.http import server


class Served:
    """Stands in for loading, the scheduler and the server, and records their calls."""

    def __init__(self) -> None:
        self.load: dict[str, Any] = {}
        self.loaded: Any = None
        self.options: dict[str, Any] = {}
        self.service: Any = None
        self.app: Any = None
        self.seconds = 0.0
        self.closed: list[float] = []
        self.flash_closed = 0
        on_cpu = SimpleNamespace(accelerator=None)
        handle = SimpleNamespace(stats=Counters, engines=(on_cpu,))
        self.model = SimpleNamespace(hybrimoe=handle)
        self.together = True
        self.context = 100

    def load_model(
        self, model_path: Any, gguf_path: Any, rules: Any, **settings: Any
    ) -> tuple[Any, str]:
        self.load = {"model_path": model_path, "gguf_path": gguf_path, "rules": rules, **settings}
        return self.model, "tokenizer"

    def make_scheduler(self, loaded: Any, **options: Any) -> Any:
        self.loaded = loaded
        self.options = options
        return self

    def close(self, seconds: float) -> None:
        self.closed.append(seconds)

    def load_flash(self, args: Any) -> Any:
        def close() -> None:
            self.flash_closed += 1

        target = SimpleNamespace(model=SimpleNamespace(), experts=None)
        return SimpleNamespace(
            target=target,
            tokenizer="of the pack",
            decoder="decoder",
            close=close,
            banner=lambda: ["a pack"],
        )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Served:
    found = Served()
    put_in_place(monkeypatch, found.load_model)
    monkeypatch.setattr(models, "demo_gguf", lambda form: Path(f"{form}.gguf"))
    monkeypatch.setattr(banner, "banner", lambda _model: ["the \x1b[2Jmodel"])
    monkeypatch.setattr(loading, "load_flash", found.load_flash)
    monkeypatch.setattr(command, "make_scheduler", found.make_scheduler)
    monkeypatch.delenv(flags.KEY_VARIABLE, raising=False)

    class Server:
        def __init__(self, app: Any, service: Any, seconds: float, on_ready: Any) -> None:
            found.app, found.service, found.seconds = app, service, seconds
            self.ready = on_ready

        def run(self, sockets: list[socket.socket]) -> None:
            self.ready()

    monkeypatch.setattr(server, "Server", Server)
    return found


def serve(text: str = "") -> int:
    """Serve with the flags, on a free port."""
    return main(["serve", "--port", "0", *shlex.split(text)])


def layers(seen: Served) -> list[str]:
    """Those around the application, the outermost first."""
    return [layer.cls.__name__ for layer in seen.app.user_middleware]


def test_it_is_loaded_by_the_flags_of_local_chat(seen: Served) -> None:
    assert serve("--gguf_path g.gguf --rules r.yaml --cpu_infer 3 --dtype float32") == 0
    assert seen.load == {
        "model_path": None,
        "gguf_path": "g.gguf",
        "rules": "r.yaml",
        "dtype": "float32",
        "trust_rules": False,
        "progress": sys.stderr.isatty(),
        "require_tokenizer": True,
        "cpu_threads": 3,
    }
    assert seen.loaded.decoder is None and seen.loaded.piece == 512
    assert (seen.service.model, seen.service.tokenizer) == (seen.model, "tokenizer")
    assert seen.closed == [0.0]


def test_without_a_model_it_is_the_demo(seen: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve() == 0
    assert seen.load["gguf_path"] == "mixtral.gguf" and seen.service.name == "demo-mixtral"
    assert "this is the demo model" in capsys.readouterr().err
    assert serve("--demo qwen2moe") == 0
    assert seen.load["gguf_path"] == "qwen2moe.gguf" and seen.service.name == "demo-qwen2moe"


def test_a_model_needs_no_flag_in_front(seen: Served, tmp_path: Path) -> None:
    for name, file, flag in (
        ("split", "part-00001-of-00002.gguf", "gguf_path"),
        ("checkpoint", "config.json", "model_path"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
        assert serve(str(tmp_path / name)) == 0
        assert seen.load[flag] == str(tmp_path / name) and seen.service.name == name
    assert serve(str(tmp_path / "none.gguf")) == 0
    assert seen.load["gguf_path"] == str(tmp_path / "none.gguf") and seen.service.name == "none"


def test_a_pack_is_served_with_its_decoder(seen: Served, tmp_path: Path) -> None:
    (tmp_path / "target.lever").touch()
    assert serve(str(tmp_path)) == 0
    assert (seen.loaded.decoder, seen.loaded.tokenizer) == ("decoder", "of the pack")
    assert seen.service.name == tmp_path.name and not seen.load
    assert seen.flash_closed == 1


def test_limits_reach_scheduler_and_service(seen: Served) -> None:
    assert (
        serve(
            "g --max_batch 3 --max_queue 5 --context 50 --kv_bytes 1MiB --prefix_cache_bytes 0 "
            "--max_body_bytes 2KiB --request_timeout 9 --shutdown_seconds 4 "
            "--chunk_prefill_size 64 --served_model_name other"
        )
        == 0
    )
    assert seen.options.pop("observer") is seen.service.metrics
    assert seen.options == {
        "batch": 3,
        "queue": 5,
        "kv_bytes": 1 << 20,
        "prefix_bytes": 0,
        "context": 50,
    }
    assert (seen.service.limits.body_bytes, seen.service.limits.seconds) == (2048, 9)
    assert (seen.seconds, seen.loaded.piece, seen.service.name) == (4, 64, "other")


def test_kept_prefixes_take_a_tenth_of_what_is_free_and_no_more_than_4_gib() -> None:
    assert flags.prefix_bytes(None, 1000) == 100
    assert flags.prefix_bytes(None, 1 << 40) == 4 << 30
    assert flags.prefix_bytes(5, 1000) == 5


def test_layers_are_those_that_were_asked_for(seen: Served) -> None:
    assert serve("g") == 0
    assert layers(seen) == ["RequestIds", "LocalHosts", "Closing", "Bodies"]
    assert serve("g --host 0.0.0.0 --api_key k --cors https://a.example") == 0
    assert layers(seen) == ["RequestIds", "CORSMiddleware", "Keys", "Closing", "Bodies"]


def test_keys_come_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flags.KEY_VARIABLE, " one, two,,")
    assert flags.keys(SimpleNamespace(api_key=["three", "one"])) == ("three", "one", "two")


def test_an_open_server_is_warned_about(seen: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve("g --host 0.0.0.0") == 0
    shown = capsys.readouterr()
    assert "warning: everybody who reaches 0.0.0.0 can use this model" in shown.err
    assert shown.out.startswith("http://localhost:")
    assert "\x1b" not in shown.err
    assert serve("g --host 0.0.0.0 --api_key k") == 0
    assert "warning" not in capsys.readouterr().err


def test_the_example_survives_a_shell() -> None:
    line = command.example('it\'s a "name"', "http://localhost:1", has_keys=True)
    words = shlex.split(line)
    assert words[0] == "curl" and 'it\'s a \\"name\\"' in words[-1]


@contextmanager
def taken() -> Any:
    """The number of a port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_port_in_use_is_told_before_anything_is_loaded(
    seen: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    with taken() as port:
        assert main(["serve", "g", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err == (
        f"hybrimoe: error: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
    )
    assert not seen.load


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("g --host no.such.host.invalid", "--host no.such.host.invalid: "),
        (f"g --host {'x' * 70}", "--host xxx"),
        ("g --host 192.0.2.1", "cannot listen on 192.0.2.1"),
        ("g --port 70000", "from 0 to 65535"),
        ("g --api_key 'two words'", "no spaces"),
        ("g --api_key ''", "a key has letters"),
        ("g --cors example.org", "expected an origin"),
        ("g --cors https://example.org/path", "expected an origin"),
        ("g --served_model_name ' '", "--served_model_name"),
        ("g --gguf_path h", "both name the model"),
        ("g --max_batch 0", "at least 1|from 1"),
        ("g --shutdown_seconds -1", "expected a number from 0"),
        ("g --throttle ufs4.0", "--throttle has no effect"),
        ("--replicas 2", "--replicas has no effect without --ray"),
        ("g --demo", "--demo has no effect"),
        ("g --max_num_seqs 3", "did you mean --max_batch"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_loaded(
    text: str, said: str, seen: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(text) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("hybrimoe: error: ")
    assert any(part in err[-1] for part in said.split("|")), err
    assert not seen.load


def test_without_its_libraries_it_says_how_to_install_them(
    seen: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(libraries, "LIBRARIES", ("json", "no_such_library"))
    assert serve("g") == 2
    err = capsys.readouterr().err
    assert "no_such_library: pip install 'ktransformers-hybrimoe[serve]'" in err


def test_a_failing_server_gives_everything_back(
    seen: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise OSError("no sockets")

    monkeypatch.setattr(server, "Server", fail)
    before = logging.getLogger("hybrimoe_plugin.serve.access").level
    assert serve("g") == 2
    assert seen.closed == [0.0]
    assert logging.getLogger("hybrimoe_plugin.serve.access").level == before


def test_the_name_on_the_hub_is_the_name_for_clients(
    seen: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe_plugin.hosts.hub import fetch

    monkeypatch.setattr(fetch, "find_model", lambda *_args, **_options: Path("/kept/a.gguf"))
    assert serve("org/repo:Q4_K_M") == 0
    assert seen.load["gguf_path"] == "/kept/a.gguf"
    assert seen.service.name == "org/repo:Q4_K_M"
