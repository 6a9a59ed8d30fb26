"""From a model on disk, GGUF or safetensors, to a flash pack with its tokenizer beside it."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hybrimoe_plugin.errors import ConfigError, FlashError, SpeculationError, WeightsError
from hybrimoe_plugin.families.registry import names_of
from hybrimoe_plugin.hosts.transformers.checkpoint.open import open_checkpoint
from hybrimoe_plugin.hosts.transformers.complete import check_complete
from hybrimoe_plugin.hosts.transformers.config import model_config
from hybrimoe_plugin.hosts.transformers.directory import DIRECTORY_FILES
from hybrimoe_plugin.hosts.transformers.generation import FILE as GENERATION
from hybrimoe_plugin.hosts.transformers.generation import set_generation, write_generation
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model_of
from hybrimoe_plugin.hosts.transformers.tokenizer import (
    directory_tokenizer,
    load_tokenizer,
)
from hybrimoe_plugin.operators.expert_form import read_form
from hybrimoe_plugin.weights.checkpoint.source import CheckpointSource
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.parameter_source import ParameterSource
from hybrimoe_plugin.weights.safetensors_store import SafetensorsStore
from lever_ext.flash.dtype_choice import AUTO
from lever_ext.flash.finished import finished_pack, holds_another, source_key
from lever_ext.flash.pack import FlashPack
from lever_ext.flash.plan import packed_tensors, plan_blocks
from lever_ext.flash.source import Span, file_identity
from lever_ext.flash.writer import Progress, write_pack

logger = logging.getLogger(__name__)


class StoredSource:
    """Weights of a GGUF file or a checkpoint under the names of `transformers`, one tensor at a
    time in float32.

    Args:
        store: the open files, which are checked to be complete.
        config: of the model.
        shapes: name -> shape.

    Raises:
        WeightsError: a file was changed or removed since the store was opened.
    """

    def __init__(self, store: GGUFStore, config: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        self.parameters: ParameterSource | CheckpointSource
        if isinstance(store, SafetensorsStore):
            self.parameters = CheckpointSource(store, config)
        else:
            self.parameters = ParameterSource(store, config, names_of(config.model_type))
        self.shapes = shapes
        spans: list[list[Span]] = [[] for _ in store.paths]
        for info in store.tensors.values():
            spans[info.file].append(Span(info.offset, info.nbytes))
        files = zip(store.paths, spans, strict=True)
        self.identity = ",".join(file_identity(path, found) for path, found in files)
        store.check_unchanged()  # the files were opened by name once more
        self._stacked: dict[str, torch.Tensor] = {}
        """Stacked tensors of one layer's experts."""

    def get(self, name: str) -> torch.Tensor:
        return self.parameters.load(name, self.shapes[name], torch.float32)

    def expert(self, name: str, expert: int) -> torch.Tensor:
        if isinstance(self.parameters, CheckpointSource):
            found = self.parameters.expert(name, expert, torch.float32)
            if found is not None:
                return found
        # A layer's experts are asked for one after another: its stacked tensors are made once for
        # all of them, and dropped when the next layer is asked for.
        if name not in self._stacked:
            layer = name.rpartition(".experts.")[0]
            others = [kept for kept in self._stacked if not kept.startswith(f"{layer}.experts.")]
            for other in others:
                del self._stacked[other]
            self._stacked[name] = self.get(name)
        return self._stacked[name][expert]


def pack_model(
    directory: str | Path,
    model_path: str | Path | None = None,
    gguf_path: str | Path | None = None,
    dtype: str = AUTO,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Pack a model; an interrupted run is resumed, a finished pack of the same model kept.

    The tokenizer beside a pack that is kept is written again.

    Args:
        directory: gets the pack, the tokenizer and its chat template.
        model_path: directory with config.json, tokenizer and, without `gguf_path`, safetensors
            files.
        gguf_path: GGUF file, split set or directory.
        dtype: stored type of all weights, in which the target then computes: bfloat16, float16 or
            float32. auto is float16, or bfloat16 where weights or activations do not fit into it.
        progress: told (bytes done, bytes in all).
        force: replace whatever pack is in the directory.

    Returns:
        the pack's path.

    Raises:
        ConfigError: no model named, unknown dtype, or files that name code to be run.
        WeightsError: the model's files are missing, damaged, or do not fit its config.
        BackendError: the model's experts are of a form that is not computed.
        FlashError: no space, the disk failed, or a pack of another model is there.
    """
    if model_path is None and gguf_path is None:
        raise ConfigError(
            "name a model to pack: --gguf_path, or --model_path with safetensors files"
        )
    store = GGUFStore.open(gguf_path) if gguf_path is not None else open_checkpoint(str(model_path))
    config = model_config(model_path, store)
    tokenizer = load_tokenizer(model_path, store, config)
    if tokenizer is None:
        logger.warning(
            "%s: no tokenizer there, so the pack will be of no use for chat; name a directory "
            "with one by --model_path",
            gguf_path or model_path,
        )
    plain = plain_config(config)
    model = meta_model_of(plain, torch.float32)
    set_generation(model, tokenizer, store.metadata, model_path, config.vocab_size)
    _check_packable(model)
    check_complete(model, store, config)
    shapes = {name: tuple(value.shape) for name, value in packed_tensors(model).items()}
    source = StoredSource(store, config, shapes)
    key = source_key(source, plain)
    path = None if force else finished_pack(directory, key, dtype)
    if path is None:
        former = partial(_remove_others_tokenizer, Path(directory), model_path, key)
        path = write_pack(source, model, plain, directory, dtype, progress, replacing=former)
    # Beside a pack that is kept too: the run that wrote it may have been cut off here.
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
        write_generation(model.generation_config, directory)
    except OSError as error:
        raise FlashError(
            f"{directory}: cannot write the tokenizer and generation config beside the pack "
            f"({error.strerror or error}); the same command writes them again"
        ) from error
    return path


def _check_packable(model: Any) -> None:
    """Refuse what a pack cannot hold, or a target not compute, before anything is written.

    Raises:
        WeightsError: numbers that are no floating point.
        BackendError: experts that compute something else than ours, or lie in another way.
    """
    plan_blocks(model, "float32")
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            read_form(name, module)


def _remove_others_tokenizer(directory: Path, model_path: str | Path | None, key: str) -> None:
    """Remove what lies beside a pack of another model, so that it never gets beside this one.

    Args:
        model_path: of the model that is packed: if it is the same directory, its files stay.
        key: `source_key` of that model.
    """
    if not holds_another(directory, key):
        return
    if model_path is not None and os.path.samefile(directory, model_path):
        return
    templates = (*directory.glob("*.jinja"), *directory.glob("additional_chat_templates/*.jinja"))
    named = [directory / name for name in (*DIRECTORY_FILES, GENERATION)]
    for path in (*named, *templates):
        path.unlink(missing_ok=True)


def plain_config(config: Any) -> dict[str, Any]:
    """A config as JSON values, without what says nothing about the model."""
    dropped = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures")
    values: dict[str, Any] = config.to_diff_dict()
    kept = {key: value for key, value in values.items() if key not in dropped}
    return {"model_type": config.model_type, **kept}


def pack_tokenizer(pack: str | Path) -> Any:
    """The tokenizer beside a pack.

    Raises:
        FlashError: none there, or unreadable.
        ConfigError: it is code of its own, which is never run.
    """
    directory = pack_directory(pack)
    try:
        return directory_tokenizer(directory)
    except WeightsError as error:
        raise FlashError(
            f"{directory}: no readable tokenizer beside the pack; pack the model again, with "
            f"--model_path if the GGUF has no tokenizer ({error})"
        ) from error


def stored_dtype(pack: str | Path) -> str:
    """The type that a pack's weights are stored in.

    Raises:
        FlashError: no readable pack.
    """
    opened = FlashPack.open(pack, threads=1)
    opened.close()
    return opened.index.dtype


def pack_directory(pack: str | Path) -> Path:
    """The directory of a pack's tokenizer and generation config."""
    path = Path(pack)
    return path if path.is_dir() else path.parent


def check_same_tokenizer(target: Any, draft: Any) -> None:
    """Compare the tokenizers of target and draft.

    Raises:
        SpeculationError: a token that means something else, or is missing.
    """
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours == theirs:
        return
    wrong = [token for token in ours if theirs.get(token) != ours[token]]
    example = ""
    if wrong:
        first = min(wrong, key=lambda token: ours[token])
        example = (
            f"; token {first!r} is {ours[first]} in the target, {theirs.get(first)} in the draft"
        )
    raise SpeculationError(
        f"target and draft do not share a tokenizer ({len(ours)} and {len(theirs)} tokens"
        f"{example}); choose a draft of the target's family, or --draft ngram"
    )
