"""How answers are drawn and where they end, as the model's own files say."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hybrimoe_plugin.config import COLDEST_TEMPERATURE
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.hosts.ends import ends_of
from hybrimoe_plugin.hosts.files import read_json

log = logging.getLogger(__name__)

FILE = "generation_config.json"


class _Range(NamedTuple):
    """Numbers that transformers' processors take."""

    low: float
    high: float = math.inf
    low_excluded: bool = False
    whole: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        start = "above" if self.low_excluded else "from"
        text = f"{kind} {start} {self.low:g}"
        if math.isinf(self.high):
            return text
        return f"{text} to {self.high:g}"

    def holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not math.isfinite(value) or (self.whole and value != int(value)):
            return False
        if self.low_excluded and value == self.low:
            return False
        return self.low <= value <= self.high


_NUMBERS = {
    "temperature": _Range(0.0, 100.0),
    "top_k": _Range(-1, whole=True),
    "top_p": _Range(0.0, 1.0),
    "min_p": _Range(0.0, 1.0),
    "top_h": _Range(0.0, 1.0, low_excluded=True),
    "typical_p": _Range(0.0, 1.0, low_excluded=True),
    "epsilon_cutoff": _Range(0.0, 1.0),
    "eta_cutoff": _Range(0.0, 1.0),
    "repetition_penalty": _Range(0.0, 100.0, low_excluded=True),
    "no_repeat_ngram_size": _Range(0, 1 << 20, whole=True),
    "min_new_tokens": _Range(0, 1 << 31, whole=True),
}
"""Settings that change which token is chosen."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NO_TOKEN: tuple[Any, ...] = (-1, [])
"""By which older exports mean that there is none."""
_SILENT = (
    "transformers_version",
    "_from_model_config",
    "max_length",
    "max_new_tokens",
    "use_cache",
    "num_return_sequences",
    "num_beams",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "trust_remote_code",
)
"""Keys that mean nothing here: lengths are the caller's, and one sequence is decoded without beams.
"""


def set_generation(
    model: Any,
    tokenizer: Any,
    metadata: Mapping[str, Any],
    directory: str | Path | None = None,
    size: int | None = None,
) -> None:
    """Let `generate` draw, end and pad as the model's files say. Mutates: the generation config.

    Args:
        tokenizer: of the model, or None.
        metadata: of the GGUF file; empty where there is none.
        directory: which may hold a generation_config.json.
        size: rows of the embedding.

    Raises:
        ConfigError: a value in generation_config.json is out of range.
        WeightsError: the file cannot be read.
    """
    config = model.generation_config
    given = {} if directory is None else read_generation(directory)
    for name, value in given.items():
        setattr(config, name, value)
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        candidates = (
            given.get(name),
            getattr(tokenizer, name, None),
            metadata.get(f"tokenizer.ggml.{key}_token_id"),
            getattr(config, name, None),
        )
        setattr(config, name, next((token for token in candidates if _is_token(token, size)), None))
    # A list comes from config.json; a single id may be its class's default.
    listed = config.eos_token_id if isinstance(config.eos_token_id, list) else []
    ends = ends_of(tokenizer, metadata, as_list(given.get("eos_token_id", listed)), size)
    if ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if config.pad_token_id is None and config.eos_token_id is not None:
        # As the tokenizer ends, not as it changes turns.
        config.pad_token_id = (
            getattr(tokenizer, "eos_token_id", None) or as_list(config.eos_token_id)[0]
        )


def _is_token(token: Any, size: int | None) -> bool:
    return type(token) is int and token >= 0 and (size is None or token < size)


def as_list(token: Any) -> list[int]:
    """Token ids of a generation config as a list."""
    return token if isinstance(token, list) else [] if token is None else [token]


def read_generation(directory: str | Path) -> dict[str, Any]:
    """What generation_config.json says about drawing and special tokens; empty without the file.

    Raises:
        ConfigError: a value is out of range, with what is expected.
        WeightsError: the file cannot be read.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return {}
    found: dict[str, Any] = {}
    unused = []
    for key, value in read_json(path).items():
        if value is None or key in _SILENT or (key in _TOKENS and value in _NO_TOKEN):
            continue
        if key in _NUMBERS:
            found[key] = _number(key, value, path)
        elif key in _TOKENS:
            found[key] = _token(key, value, path)
        elif key == "do_sample":
            if not isinstance(value, bool):
                raise ConfigError(f"{path}: do_sample is {value!r}; expected true or false")
            found[key] = value
        else:
            unused.append(key)
    if unused:
        log.warning("%s: not used: %s", path, ", ".join(sorted(unused)))
    if found.get("temperature", 1.0) < COLDEST_TEMPERATURE:
        # transformers draws at a temperature above 0 only; by 0 people mean the likeliest token.
        del found["temperature"]
        found["do_sample"] = False
    return found


def write_generation(config: Any, directory: str | Path) -> None:
    """Store what `read_generation` reads back. Raises: OSError."""
    values = {}
    for name in (*_NUMBERS, *_TOKENS, "do_sample"):
        value = getattr(config, name, None)
        if value is not None:
            values[name] = value
    path = Path(directory) / FILE
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _number(key: str, value: Any, path: Path) -> float | int:
    allowed = _NUMBERS[key]
    if not allowed.holds(value):
        raise ConfigError(f"{path}: {key} is {value!r}; expected {allowed}. Correct or remove it")
    # -1 turns the filter off for other programs; processors want floats where JSON has 1.
    return max(0, int(value)) if allowed.whole else float(value)


def _token(key: str, value: Any, path: Path) -> Any:
    ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
    if not ids or any(type(one) is not int or one < 0 for one in ids):
        raise ConfigError(f"{path}: {key} is {value!r}; expected the id of a token")
    return value
