"""Starts the real `ktransformers.local_chat` in this process, with the patches that it needs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.families.packaged_rules import classic_rules
from hybrimoe_plugin.hosts.files import read_json
from hybrimoe_plugin.hosts.ktransformers.changes import Changes
from hybrimoe_plugin.hosts.ktransformers.directory import refuse_own_code, run_no_code
from hybrimoe_plugin.hosts.ktransformers.ending import EndingTokenizer, without_second_think
from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

log = logging.getLogger(__name__)

LOCAL_CHAT = "ktransformers.local_chat"


@dataclass(frozen=True)
class Launch:
    """How to start it.

    Attributes:
        flags: of `local_chat`, by name; those that are None are left out.
        prompt: answer this and end, instead of asking for messages.
        greedy: take the likeliest token, where kTransformers draws with temperature 0.1.
        seed: of the draw.
        quiet: leave out what is printed for every tensor while it loads.
    """

    flags: Mapping[str, Any]
    prompt: str | None = None
    greedy: bool = False
    seed: int | None = None
    quiet: bool = True


def run_local_chat(
    launch: Launch,
    loaded: Callable[[Any], None] = lambda _model: None,
    answered: Callable[[list[int]], None] = lambda _tokens: None,
) -> None:
    """Run it to its end, which is the end of the input.

    Args:
        launch: what to run.
        loaded: called with the model when it is ready.
        answered: called with the token ids of each answer.

    Raises:
        ConfigError: the model directory's tokenizer or config is code of its own.
        HybriMoEError: what the patches and operators refuse.
    """
    refuse_own_code(launch.flags.get("model_path"))
    with contextlib.redirect_stdout(io.StringIO()) if launch.quiet else contextlib.nullcontext():
        applied = apply_patches()
    with applied:
        log.info("ktransformers patches in force: %s", ", ".join(applied.names) or "none")
        run_no_code(applied.changes)
        _adjust(applied.changes, launch, loaded, answered)
        argv = [
            LOCAL_CHAT,
            *(f"--{name}={value}" for name, value in launch.flags.items() if value is not None),
        ]
        with (
            _process(argv, launch.prompt),
            warnings.catch_warnings(),
            contextlib.suppress(EOFError),
        ):
            if (
                launch.quiet
            ):  # its loader sees mapped files through arrays that must not be written, and does not
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            if launch.seed is not None:
                torch.manual_seed(launch.seed)
            runpy.run_module(LOCAL_CHAT, run_name="__main__", alter_sys=True)


def packaged_rules(model_path: str, device: str) -> Path:
    """Our rules for the architecture that a model directory names, `device` being cpu or gpu.

    Raises:
        WeightsError: no readable config.json there.
        RulesError: no rules for its architecture.
    """
    return classic_rules(architecture(model_path), device)


def architecture(model_path: str) -> str:
    """The architecture in a model directory's config.json. Raises: WeightsError: none there."""
    path = Path(model_path) / "config.json"
    try:
        return str(read_json(path)["architectures"][0])
    except (WeightsError, LookupError, TypeError) as error:
        raise WeightsError(
            f"{path}: no architecture can be read there ({type(error).__name__}: {error})"
        ) from error


def names_cuda(rules: Path) -> bool:
    """Whether any rule places something on CUDA. Raises: RulesError: the file is no rules file."""
    from hybrimoe_plugin.injection.rules import load_rules

    return any(
        "cuda" in str(value) for rule in load_rules(rules).rules for value in rule.kwargs.values()
    )


def as_lines(prompt: str) -> str:
    """A prompt as `local_chat` reads it from a terminal.

    Raises:
        ConfigError: it holds the marks that end a message of several lines.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    if "\n" not in prompt:
        return prompt + "\n"
    if '"""' in prompt:
        raise ConfigError('a prompt of several lines cannot hold """, which ends it for local_chat')
    return f'"""{prompt}"""\n'


def _adjust(
    changes: Changes,
    launch: Launch,
    loaded: Callable[[Any], None],
    answered: Callable[[list[int]], None],
) -> None:
    """What this start asks for beyond the patches."""
    optimize: Any = importlib.import_module("ktransformers.optimize.optimize")
    utils: Any = importlib.import_module("ktransformers.util.utils")
    load: Callable[..., None] = optimize.optimize_and_load_gguf
    generate: Callable[..., Any] = utils.prefill_and_generate

    @functools.wraps(load)
    def load_quietly(module: Any, *arguments: Any, **options: Any) -> None:
        with (
            contextlib.redirect_stdout(io.StringIO()) if launch.quiet else contextlib.nullcontext()
        ):
            load(module, *arguments, **options)
        loaded(module)

    @functools.wraps(generate)
    def prefill_and_generate(model: Any, *arguments: Any, **options: Any) -> Any:
        with _greedily(model) if launch.greedy else contextlib.nullcontext():
            tokens = generate(model, *_ending(model, arguments), **options)
        answered(tokens)
        return tokens

    changes.set(optimize, "optimize_and_load_gguf", load_quietly)
    changes.set(utils, "prefill_and_generate", prefill_and_generate)


def _ending(model: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """`prefill_and_generate`'s arguments, with tokenizer and prompt as this model needs them."""
    if len(arguments) < 2:
        return arguments
    tokenizer, ids, *rest = arguments
    return EndingTokenizer.of(model, tokenizer), without_second_think(tokenizer, ids), *rest


@contextlib.contextmanager
def _greedily(model: Any) -> Iterator[None]:
    """Whatever sampling is asked for, the model's generation config says none."""
    prepare = model._prepare_generation_config
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    model._prepare_generation_config = lambda *given, **kwargs: prepare(
        *given, **{**kwargs, **greedy}
    )
    try:
        yield
    finally:
        del model._prepare_generation_config


@contextlib.contextmanager
def _process(argv: list[str], prompt: str | None) -> Iterator[None]:
    """Set `local_chat`'s arguments and input; restore what it changes in the process."""
    before = sys.argv, sys.stdin, os.environ.get("TERM")
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    sys.argv = argv
    if prompt is not None:
        sys.stdin = io.StringIO(as_lines(prompt))
        os.environ["TERM"] = (
            "dumb"  # it clears the screen, which must not take the answer's surroundings away
        )
    try:
        yield
    finally:
        sys.argv, sys.stdin = before[:2]
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if prompt is not None:
            os.environ.pop("TERM")
            if before[2] is not None:
                os.environ["TERM"] = before[2]
