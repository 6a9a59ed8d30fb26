"""`hybrimoe serve`: answer the clients of the OpenAI and Anthropic APIs from one loaded model."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from hybrimoe_plugin.cli.chat import flags as chat_flags
from hybrimoe_plugin.cli.chat import loading
from hybrimoe_plugin.cli.chat.records import Records
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import Parser
from hybrimoe_plugin.cli.main import FLASH_CHAT, find_module, keep_off_hubs
from hybrimoe_plugin.cli.serve import flags, libraries, scaling
from hybrimoe_plugin.cli.setting_flags import add_settings
from hybrimoe_plugin.config import parse_bytes
from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.files import printable

COMMON = (
    *("gguf_path", "model_path", "rules", "demo", "device"),
    *("host", "port", "api_key", "served_model_name", "cors"),
    *("max_batch", "max_queue", "kv_bytes", "prefix_cache_bytes"),
    *("request_timeout", "shutdown_seconds", "log_requests", "quiet", "ray"),
    *("cache_ratio", "cache_bytes", "cpu_threads", "context"),
    *("flash_pack", "draft", "dram_budget"),
)
"""Flags that most people need: `--help` shows these, `--help_all` shows all."""


class Loaded(NamedTuple):
    """What is served.

    Attributes:
        piece: tokens of a prompt that are computed at once.
        decoder: of a target on flash; None for others.
        banner: lines about the model.
        store: where experts on flash lie (`serve.live.places.ExpertStore`); None for others.
    """

    model: Any
    tokenizer: Any
    piece: int
    decoder: Any
    banner: list[str]
    store: Any = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags; those of loading are local_chat's."""
    if isinstance(parser, Parser):
        parser.synonyms = {**chat_flags.SYNONYMS, **flags.SYNONYMS}
    flags.add_model(parser)
    chat_flags.add_model_choice(parser)
    flags.add_address(parser.add_argument_group("address"))
    limits = parser.add_argument_group("requests")
    flags.add_limits(limits)
    chat_flags.add_piece(limits)
    scaling.add_arguments(parser.add_argument_group("several machines or GPUs"))
    add_settings(parser)
    find_module(FLASH_CHAT).add_arguments(parser)
    chat_flags.add_records(parser.add_argument_group("records"))
    chat_flags.add_foreign(parser.add_argument_group("flags of ktransformers.local_chat"))


def run(args: argparse.Namespace) -> int:
    """Load the model, then serve until a signal.

    Raises:
        HybriMoEError: what is asked for cannot be done; before the model is loaded, where that can
            be known.
    """
    libraries.check()
    loading.be_quiet(args)
    flags.place_model(args)
    scaling.refuse_idle(args)
    choice = loading.chosen(args)
    keys, origins, name = flags.keys(args), flags.origins(args), flags.served_name(args)
    loading.announce(args)

    from hybrimoe_plugin.serve.http.layers import Access
    from hybrimoe_plugin.serve.http.server import listen

    access = Access(args.host, keys, origins)
    if args.ray:
        with listen(args.host, args.port) as port:
            args.port = port.getsockname()[1]
        scaling.run(args, access, lambda: _announce(args, [], name, _address(args), access))
        return 0
    with listen(args.host, args.port) as port, _logging(args):
        loading.check_machine(choice)
        with _loaded(args, choice) as loaded:
            _serve(args, loaded, name, access, port)
    return 0


def make_scheduler(loaded: Loaded, **options: Any) -> Any:
    """The scheduler of one model (`serve.requests.Scheduling`); tests put another one here."""
    from hybrimoe_plugin.serve.batching.scheduler import Scheduler

    return Scheduler(
        loaded.model,
        piece=loaded.piece,
        decoder=loaded.decoder,
        **options,
    )


@contextmanager
def _logging(args: argparse.Namespace) -> Iterator[None]:
    """Let each request have its line, unless that is turned off."""
    is_logged = args.log_requests and not args.quiet
    levels = {
        "hybrimoe_plugin.serve.access": logging.INFO if is_logged else logging.WARNING,
        "uvicorn.error": logging.ERROR if args.quiet else logging.WARNING,
    }
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _loaded(args: argparse.Namespace, choice: loading.Chosen) -> Iterator[Loaded]:
    """The model, for as long as it is served."""
    with ExitStack() as opened:
        if choice.flash:
            flash = loading.load_flash(args)
            opened.callback(flash.close)
            yield Loaded(
                flash.target.model,
                flash.tokenizer,
                chat_flags.CPU_PIECE,
                flash.decoder,
                flash.banner(),
                flash.target.experts,
            )
            return
        records = opened.enter_context(Records(args.timeline, args.record_trace, args.quiet))
        model, tokenizer = loading.load(args, loading.sources(args), choice.settings)
        records.attach(model)

        from hybrimoe_plugin.cli.chat.banner import banner

        yield Loaded(model, tokenizer, loading.piece(args, model), None, banner(model))


@contextmanager
def replica(args: argparse.Namespace, threads: int) -> Iterator[Any]:
    """A `MakeApp`: what a replica of `--ray` serves.

    Args:
        args: of `hybrimoe serve`.
        threads: that compute experts, unless `args` says otherwise.
    """
    keep_off_hubs()
    if not hasattr(args, "cpu_threads") and args.cpu_infer is None:  # two names of one thing
        args.cpu_threads = threads
    loading.be_quiet(args)
    choice = loading.chosen(args)
    loading.check_machine(choice)

    from hybrimoe_plugin.serve.http.layers import Access

    name = flags.served_name(args)
    with _logging(args), _loaded(args, choice) as loaded, _served(args, loaded, name) as service:
        # The ingress has asked for keys already.
        yield _application(service, Access())


def _serve(
    args: argparse.Namespace, loaded: Loaded, name: str, access: Any, port: socket.socket
) -> None:
    """Answer requests until a signal."""
    from hybrimoe_plugin.serve.http.server import Server

    args.port = port.getsockname()[1]
    with _served(args, loaded, name) as service:

        def ready() -> None:
            _announce(args, loaded.banner, name, _address(args), access)

        app = _application(service, access)
        Server(app, service, args.shutdown_seconds, ready).run([port])


@contextmanager
def _served(args: argparse.Namespace, loaded: Loaded, name: str) -> Iterator[Any]:
    """The service of a loaded model, with a scheduler that runs."""
    from hybrimoe_plugin.device.memory import free_host_bytes
    from hybrimoe_plugin.serve.metrics.metrics import Metrics
    from hybrimoe_plugin.serve.service import Limits, Service

    handle = getattr(loaded.model, "hybrimoe", None)
    metrics = Metrics(name, None if handle is None else handle.stats)
    kept = flags.prefix_bytes(_bytes(args.prefix_cache_bytes), free_host_bytes())
    scheduler = make_scheduler(
        loaded,
        batch=args.max_batch,
        queue=args.max_queue,
        kv_bytes=_bytes(args.kv_bytes),
        prefix_bytes=kept,
        context=getattr(args, "context", None),
        observer=metrics,
    )
    try:
        body_bytes = parse_bytes(args.max_body_bytes)
        limits = Limits(body_bytes=body_bytes, seconds=args.request_timeout)
        service = Service(loaded.model, loaded.tokenizer, name, scheduler, limits)
        service.metrics = metrics
        service.store = loaded.store
        # The first grammar would hold all other threads up for a second or more.
        threading.Thread(target=_prepare_grammars, args=(loaded.tokenizer,), daemon=True).start()
        yield service
    finally:
        scheduler.close(0.0)


def _prepare_grammars(tokenizer: Any) -> None:
    from hybrimoe_plugin.serve.sampling.grammar import convert

    with suppress(HybriMoEError):  # told to whoever asks for a grammar
        convert(tokenizer)


def _application(service: Any, access: Any) -> Any:
    from hybrimoe_plugin.serve.api.app import build_app
    from hybrimoe_plugin.serve.http.layers import surround
    from hybrimoe_plugin.serve.routers import all_routers

    app = build_app(service, all_routers(service))
    surround(app, service, access)
    return app


def _bytes(text: str | None) -> int | None:
    return None if text is None else parse_bytes(text)


def _address(args: argparse.Namespace) -> str:
    """What to type into a browser on this machine."""
    host = "localhost" if args.host in ("", "0.0.0.0", "::") else args.host
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{args.port}"


def _announce(
    args: argparse.Namespace, banner: Sequence[str], name: str, address: str, access: Any
) -> None:
    """Say what is served, where, and how to try it. The address alone goes to stdout."""
    from hybrimoe_plugin.serve.http.hosts import is_local

    if not args.quiet:
        print(*map(printable, banner), sep="\n", file=sys.stderr, flush=True)
        if not is_local(args.host) and not access.keys:
            notice(
                f"warning: everybody who reaches {args.host} can use this model: give --api_key, "
                f"or set {flags.KEY_VARIABLE}"
            )
        notice(f"serving {name}: OpenAI's API below {address}/v1, a page to chat at {address}/")
        notice(f"try: {example(name, address, bool(access.keys))}")
        notice("Ctrl-C ends it when running answers are complete, a second Ctrl-C at once")
    print(address, flush=True)


def example(name: str, address: str, has_keys: bool) -> str:
    """A line for the shell that asks something."""
    body = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
    kind = "-H 'content-type: application/json'"
    if has_keys:
        kind += f' -H "authorization: Bearer ${flags.KEY_VARIABLE}"'
    return f"curl {address}/v1/chat/completions {kind} -d {shlex.quote(json.dumps(body))}"
