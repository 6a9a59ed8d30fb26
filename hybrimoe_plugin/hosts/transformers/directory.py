"""A model directory's configuration, read so that nothing in it is run, fetched or asked about.

transformers takes much from these files: classes in Python files beside them (`auto_map`), kernels
from a model hub (`attn_implementation: org/name`), classes by name. Here the values are read as
JSON, keys that name code are refused or left out, and transformers gets the values that remain,
never the directory's name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.families.registry import usual_type
from hybrimoe_plugin.hosts.files import check_file, read_json

log = logging.getLogger(__name__)

MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_TEMPLATE_BYTES = 2**20
MAX_LAYERS = 1024
"""Decoder layers; the largest published models have some 130."""

_OWN_CODE = ("auto_map", "custom_pipelines")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_PLAIN = (
    None,
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "batched_mm",
    "grouped_mm",
)
"""Implementations by name that are transformers' own. They are left out: the host chooses for
itself.
"""
_FETCHING = (
    "use_kernels",
    "use_kernel_forward_from_hub",
    "kernel_config",
    "trust_remote_code",
    "custom_generate",
)
_LEFT_OUT = (
    *_OWN_CODE,
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "dtype",
    "torch_dtype",
    "quantization_config",
)
"""Keys of sound directories that mean nothing here: where the files came from, how other weights
were stored.
"""

_OF_THE_WHOLE = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""What a model with several parts states once for all of them."""

_NO_JSON_NUMBERS = ("Infinity", "-Infinity", "NaN")

_TOKENIZER_BASES = (
    "PreTrainedTokenizer",
    "TokenizersBackend",
    "PythonBackend",
    "SentencePieceBackend",
)
DIRECTORY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files that a tokenizer may be read from."""


def directory_config(directory: str | Path) -> Any:
    """The transformers config of a model directory.

    Raises:
        WeightsError: config.json cannot be read, or describes no model that transformers knows.
        ConfigError: it names code or kernels that would have to be run or fetched.
    """
    path = Path(directory) / "config.json"
    return config_of(read_json(path), str(path))


def config_of(values: Mapping[str, Any], where: str) -> Any:
    """The transformers config of a config.json's contents; `where` is named in errors.

    Raises:
        WeightsError: it describes no causal language model that transformers knows.
        ConfigError: it names code or kernels that would have to be run or fetched.
    """
    from transformers import AutoConfig

    values = _language_part(values, where)
    kind = _model_type(values, where)
    _refuse_fetching(values, where)
    _check_layers(values, where)
    _check_answers(values, where)
    try:
        config = AutoConfig.for_model(kind, **_kept(values, kind, where))
    except ConfigError:
        raise
    except Exception as error:  # strict dataclass validation raises kinds of its own
        raise WeightsError(
            f"{where}: transformers cannot make a {kind} config of it ({error})"
        ) from error
    if (
        "sliding_attention" in (getattr(config, "layer_types", None) or ())
        and not config.sliding_window
    ):
        raise WeightsError(
            f"{where}: layer_types names sliding attention, and there is no sliding_window"
        )
    return config


def check_tokenizer_files(directory: str | Path) -> None:
    """Look at a directory's tokenizer before transformers reads it.

    Raises:
        WeightsError: a file of it is no regular file, far too large, or unreadable.
        ConfigError: it names a class that is not one of transformers' tokenizers.
    """
    folder = Path(directory)
    for name in DIRECTORY_FILES:
        if _exists(folder / name):
            check_file(folder / name, MAX_TOKENIZER_BYTES)
    for path in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")):
        check_file(path, MAX_TEMPLATE_BYTES)
    path = folder / "tokenizer_config.json"
    if not _exists(path):
        return
    values = read_json(path)
    if values.get("auto_map"):
        raise ConfigError(
            f"{path}: auto_map names a tokenizer in Python files of the directory, and code from "
            "model directories is never run: leave model_path out to take the GGUF's tokenizer, or "
            "remove auto_map where tokenizer.json is the whole tokenizer"
        )
    check_tokenizer_class(values.get("tokenizer_class"), str(path))


def check_tokenizer_class(name: Any, where: str) -> None:
    """transformers would take any of its classes by this name, loaders of whole models included.

    Raises:
        ConfigError: it is none of transformers' tokenizers.
    """
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    if name is None:
        return
    known = {
        str(one).removesuffix("Fast") for one in TOKENIZER_MAPPING_NAMES.values() if one is not None
    }
    if not isinstance(name, str) or name.removesuffix("Fast") not in known.union(_TOKENIZER_BASES):
        raise ConfigError(
            f"{where}: tokenizer_class {name!r} is none of transformers' tokenizers; nothing else "
            f"is run"
        )


def _language_part(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The config of the language model, where this one has parts of other kinds too."""
    text = values.get("text_config")
    if not isinstance(text, dict) or not isinstance(text.get("model_type"), str):
        return values
    log.warning(
        "%s: model type %s has parts of other kinds; only its language model is loaded",
        where,
        values.get("model_type"),
    )
    _refuse_fetching(values, where)
    shared = {name: values[name] for name in _OF_THE_WHOLE if name in values and name not in text}
    return {**shared, **text}


def _model_type(values: Mapping[str, Any], where: str) -> str:
    """The type of a causal language model.

    Models with parts of other kinds are refused: configs of those would be looked up by name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401 (fills the mappings)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        kind = usual_type(kind)
    if (
        isinstance(kind, str)
        and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and kind in CONFIG_MAPPING
    ):
        # Releases of transformers name the parts differently.
        if any(
            getattr(CONFIG_MAPPING[kind], name, None)
            for name in ("sub_configs", "sub_configs_defaults")
        ):
            raise WeightsError(
                f"{where}: model type {kind!r} has parts of other kinds; only language models are "
                f"read"
            )
        return kind
    if values.get("auto_map"):
        raise ConfigError(
            f"{where}: auto_map names Python files of the directory for model type {kind!r}, which "
            "transformers does not have itself, and code from model directories is never run"
        )
    raise WeightsError(
        f"{where}: transformers cannot read it: it has no causal language model of type {kind!r}"
    )


def _refuse_fetching(values: Any, where: str) -> None:
    """Raise ConfigError for a key, at any depth, that makes transformers fetch or run something."""
    for key, value in _entries(values):
        name = key.removeprefix("_").removesuffix("_internal").removesuffix("_autoset")
        plain = name in _IMPLEMENTATIONS and (isinstance(value, bool) or value in _PLAIN)
        if name in _IMPLEMENTATIONS and not plain:
            raise ConfigError(
                f"{where}: {key} {value!r} names kernels to fetch; only transformers' own are used"
            )
        if key in _FETCHING and value:
            raise ConfigError(
                f"{where}: {key} asks for code or kernels to be fetched, which is never done"
            )


def _entries(values: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of all objects in a JSON value."""
    left = [values]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            yield from one.items()
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)


def _check_layers(values: Mapping[str, Any], where: str) -> None:
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise WeightsError(
            f"{where}: num_hidden_layers is {layers}; more than {MAX_LAYERS} is refused"
        )


def _check_answers(values: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for what every answer would fail by."""
    for key, needed in (
        ("output_attentions", False),
        ("return_dict", True),
        ("use_return_dict", True),
    ):
        if values.get(key, needed) is not needed:
            raise ConfigError(
                f"{where}: {key} must be {str(needed).lower()} or left out; found {values[key]!r}"
            )


def _kept(values: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """The values that transformers is given."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if values.get("auto_map"):
        log.warning(
            "%s: the model's own code (auto_map) is not run; transformers' %s takes its place",
            where,
            kind,
        )
    check_tokenizer_class(values.get("tokenizer_class"), where)
    kept = {}
    for key, value in values.items():
        name = key.removeprefix("_").removesuffix("_internal").removesuffix("_autoset")
        if key == "model_type" or key in _LEFT_OUT or key in _FETCHING or name in _IMPLEMENTATIONS:
            continue
        # Unknown keys become attributes of the config; none may take the place of a method.
        if (
            key.startswith("__")
            or key == "attribute_map"
            or callable(getattr(CONFIG_MAPPING[kind], key, None))
        ):
            raise ConfigError(f"{where}: {key!r} is no setting of a model")
        kept[key] = _with_numbers(value)
    return kept


def _with_numbers(value: Any) -> Any:
    """A JSON value in which transformers' words for infinity and NaN are numbers again.

    They stand as `{"__float__": "Infinity"}`, as JSON has no such numbers.
    """
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in _NO_JSON_NUMBERS:
        return float(value["__float__"])
    return {key: _with_numbers(item) for key, item in value.items()}


def _exists(path: Path) -> bool:
    return os.path.lexists(path)
