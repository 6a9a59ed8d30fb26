"""The structure that an answer must have: OpenAI's `response_format`, vLLM's own fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.serve.api.checks import Check, list_of, mapping, one_of, text, wrong
from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.text import grammars
from hybrimoe_plugin.serve.text.language import Wanted

_choices = list_of(text, fewest=1)


def _schema(name: str, value: Any) -> dict[str, Any] | bool:
    if isinstance(value, dict | bool):
        return value
    raise wrong(name, "a JSON schema")


_GUIDED: Mapping[str, tuple[str, Check]] = {
    "json": ("json_schema", _schema),
    "regex": ("regex", text),
    "choice": ("choice", _choices),
    "grammar": ("ebnf", text),
}
"""vLLM's name -> kind of grammar, and what the field may hold."""

STRUCTURE: Mapping[str, Check] = {
    "response_format": mapping,
    "structured_outputs": mapping,
    **{f"guided_{name}": check for name, (_, check) in _GUIDED.items()},
}
"""Field -> its check, as in `fields.COMMON`."""

Structure = tuple[str, str, Any]
"""The field that asks for it, and kind and specification of the grammar."""


def structure_of(given: Mapping[str, Any]) -> Structure | None:
    """The one structure that is asked for; None where text is free.

    Args:
        given: checked by `STRUCTURE`.

    Raises:
        ApiError: a part of it is wrong, or there are several.
    """
    found = [
        (f"guided_{name}", kind, given[f"guided_{name}"])
        for name, (kind, _) in _GUIDED.items()
        if f"guided_{name}" in given
    ]
    if "response_format" in given:
        found += _response_format(given["response_format"])
    if "structured_outputs" in given:
        found += _structured_outputs(given["structured_outputs"])
    if len(found) > 1:
        names = " and ".join(sorted(name for name, _, _ in found))
        raise ApiError(
            400, f"an answer has one structure, and {names} ask for several", found[0][0]
        )
    return found[0] if found else None


async def with_structure(wanted: Wanted, structure: Structure | None, tokenizer: Any) -> Wanted:
    """The same, but for a grammar of the structure; None leaves the text free.

    Raises:
        ApiError: it cannot be compiled, with the reason.
    """
    if structure is None:
        return wanted
    name, kind, spec = structure
    try:
        grammar = await grammars.compiled(kind, spec, tokenizer)
    except HybriMoEError as error:
        raise ApiError(400, f"{name}: {error}", name) from error
    return replace(wanted, sampling=replace(wanted.sampling, grammar=grammar))


def _response_format(value: Mapping[str, Any]) -> list[Structure]:
    name = "response_format"
    kind = one_of("text", "json_object", "json_schema")(f"{name}.type", value.get("type"))
    if kind == "text":
        return []
    if kind == "json_object":
        return [(name, kind, None)]
    holder = mapping(f"{name}.json_schema", value.get("json_schema"))
    return [(name, kind, _schema(f"{name}.json_schema.schema", holder.get("schema")))]


def _structured_outputs(value: Mapping[str, Any]) -> list[Structure]:
    name = "structured_outputs"
    found: list[Structure] = []
    for field, (kind, check) in _GUIDED.items():
        if value.get(field) is not None:
            found.append((name, kind, check(f"{name}.{field}", value[field])))
    if value.get("json_object") is True:
        found.append((name, "json_object", None))
    unknown = sorted(set(value) - {*_GUIDED, "json_object"})
    if unknown:
        raise ApiError(400, f"{name}.{unknown[0][:80]} is not supported by this server", name)
    return found
