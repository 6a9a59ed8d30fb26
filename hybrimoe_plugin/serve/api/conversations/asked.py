"""From what a body asks for to the question for the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrimoe_plugin.serve.api.checks import mapping, one_of
from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.api.openai_completions.structure import Structure, with_structure
from hybrimoe_plugin.serve.requests import PromptError
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.asking import Question
from hybrimoe_plugin.serve.text.language import Language, Wanted
from hybrimoe_plugin.serve.text.prompts import RESERVED, Conversation, Prompt
from hybrimoe_plugin.serve.text.tools import Tools


@dataclass(frozen=True)
class Asked:
    """One answer that is asked for.

    Attributes:
        where: the field of the conversation, for errors.
        variables: of the chat template.
        continues: whether the answer continues the last message.
        structure: that the text of the answer must have.
    """

    where: str
    messages: list[dict[str, Any]]
    tools: Tools
    variables: Mapping[str, Any]
    wanted: Wanted
    continues: bool = False
    structure: Structure | None = None


def structure_in(where: str, told: Mapping[str, Any]) -> Structure | None:
    """The structure that a `format` asks for.

    Raises:
        ApiError: it is of another kind, or has no schema.
    """
    kind = one_of("text", "json_object", "json_schema")(f"{where}.type", told.get("type"))
    if kind == "text":
        return None
    if kind == "json_object":
        return where, kind, None
    return where, kind, mapping(f"{where}.schema", told.get("schema"))


async def prompt_of(service: Service, asked: Asked) -> Prompt:
    """What the model is given.

    Raises:
        ApiError: the model cannot be asked so.
    """
    language = Language.of(service)
    check_tools(language, asked.tools)
    if asked.structure is not None and asked.tools.may_be_called:
        where = asked.structure[0]
        raise ApiError(400, f"{where} leaves no room for tool calls: forbid them", where)
    check_variables(asked.variables)
    variables = dict(asked.variables)
    if asked.structure is not None or asked.tools.must_be_called:
        variables["enable_thinking"] = False  # a grammar begins with the answer proper
    functions = asked.tools.functions if asked.tools.may_be_called else None
    conversation = Conversation(asked.messages, functions, variables, asked.continues)
    return await rendered(language, conversation, asked.where)


async def question_of(service: Service, asked: Asked, id: str) -> Question:
    """The question of a request of this id.

    Raises:
        ApiError: the model cannot be asked so, or a grammar cannot be compiled.
    """
    prompt = await prompt_of(service, asked)
    structure = asked.structure
    if asked.tools.must_be_called:
        structure = "tool_choice", "json_schema", asked.tools.schema()
    wanted = await with_structure(asked.wanted, structure, service.tokenizer)
    language = Language.of(service)
    is_plain = structure is not None
    (question,) = language.questions(id, prompt, wanted, asked.tools, is_plain)
    return question


def check_tools(language: Language, tools: Tools) -> None:
    """Refuse tools that the model cannot be given. Raises: ApiError."""
    try:
        language.check_tools(tools)
    except PromptError as error:
        raise ApiError(400, str(error), "tools") from error


def check_variables(variables: Mapping[str, Any]) -> None:
    """Refuse variables of the template that have fields of their own. Raises: ApiError."""
    for name in RESERVED.intersection(variables):
        field = "chat_template_kwargs"
        raise ApiError(400, f"{field}.{name}: this variable has a field of its own", field)


async def rendered(language: Language, conversation: Conversation, where: str) -> Prompt:
    """The prompt of a conversation.

    Args:
        where: the field that holds it.

    Raises:
        ApiError: template or tokenizer refuse it.
    """
    try:
        return await language.prompts.chat(conversation)
    except PromptError as error:
        raise ApiError(400, str(error), where) from error
