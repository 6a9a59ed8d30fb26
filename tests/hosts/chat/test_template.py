"""Chat templates come with a model: rendered as transformers does, refused in their own words,
within bounds.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from hybrimoe_plugin.cli.chat.conversation import Chat, ChatOptions
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.hosts.transformers.chat.template import ChatTemplate

MESSAGES = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "ü\n"}]


def template(text: Any, **limits: Any) -> ChatTemplate:
    tokenizer = SimpleNamespace(
        chat_template=text, special_tokens_map={"bos_token": "<s>", "extra": ["a"]}
    )
    return ChatTemplate(tokenizer, **limits)


@pytest.mark.parametrize(
    "text",
    [
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}\n{% endfor "
        "%}",
        "{% for m in messages %}\n    {% generation %}{{ m.content }}{% endgeneration %}\n{% "
        "endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% "
        "endfor %}",
        "{{ messages | tojson(indent=2, sort_keys=True) }}",
        "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ "
        "n.x }}",
        "{{ dict(a=1) }}{{ dict.fromkeys('ab') }}",
        "{% if tools is none and documents is none and add_generation_prompt %}yes{% endif %}{{ "
        "undefined }}",
        "{% macro f(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor "
        "%}",
    ],
)
def test_the_text_is_that_of_transformers(text: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    (right,), _ = render_jinja_template(
        [MESSAGES], chat_template=text, add_generation_prompt=True, bos_token="<s>"
    )
    assert template(text).render(MESSAGES) == right


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize("continues", [False, True])
def test_tools_variables_and_a_last_message_to_continue(continues: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    text = (
        "{{ tools | tojson }}{{ mood }}{% for m in messages %}<{{ m.content }}>{% endfor %}"
        "{{ add_generation_prompt }}"
    )
    (right,), _ = render_jinja_template(
        [MESSAGES],
        tools=TOOLS,
        chat_template=text,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        mood="good",
    )
    found = template(text).render(
        MESSAGES, TOOLS, {"mood": "good"}, not continues, continue_final_message=continues
    )
    assert found == right


def test_what_the_template_does_not_show_cannot_be_continued() -> None:
    with pytest.raises(ConfigError, match="cannot be continued"):
        template("{{ messages[0].content }}").render(MESSAGES, continue_final_message=True)


def test_no_message_can_hold_the_place_where_it_is_continued() -> None:
    made = template("{% for m in messages %}{{ m.content }}{% endfor %}!")
    doubled = [*MESSAGES, {"role": "user", "content": "x" * 100}]
    assert made.render(doubled, continue_final_message=True).endswith("x" * 100)


def test_variables_do_not_replace_the_conversation() -> None:
    made = template("{{ messages | length }}{{ tools is none }}")
    assert made.render(MESSAGES, None, {"messages": [], "tools": 1}) == "2True"


def test_conversations_with_tools_may_have_a_template_of_their_own() -> None:
    made = template({"default": "plain", "tool_use": "tools"})
    assert (made.render(MESSAGES), made.render(MESSAGES, TOOLS)) == ("plain", "tools")
    assert made.source == "tools"


def test_several_in_a_row_and_named_ones() -> None:
    one = template(
        {"default": "{{ messages | length }}", "tool_use": "{{ raise_exception('no') }}"}
    )
    assert [one.render(MESSAGES[:count]) for count in (1, 2)] == ["1", "2"]
    one.close()
    assert one.render(MESSAGES) == "2"
    assert template("{{ strftime_now('%Y') }}").render([]) == datetime.now().strftime("%Y")
    with pytest.raises(ConfigError, match="none of them is called default"):
        template({"tool_use": "x"}).render(MESSAGES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{{ raise_exception('wants a\nsystem message') }}",
            "refuses the conversation: wants a system message",
        ),
        ("{% for m in messages %}", "damaged: line 1: Unexpected end of template"),
        ("\n{{ messages", "damaged: line 2"),
        ("{{ messages.first.content }}", "failed: UndefinedError"),
        ("{{ messages.append(1) }}", "failed: SecurityError"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "failed: SecurityError"),
        ("{% include '/etc/passwd' %}", "failed"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "failed: RecursionError"),
        ("{{ 'x' * 20000000 }}", "20000000 characters"),
    ],
)
def test_a_template_that_cannot_be_used_says_why(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        template(text).render(MESSAGES)


TIME = "more than the 1 seconds that it may take"
MEMORY = "more than the 512 MiB of memory that it may take"
EITHER = f"{TIME}|{MEMORY}"
"""On a busy machine, time ends some that need a while to take their memory."""


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TIME),
        ("{{ 'x' * 10**10 }}", MEMORY),
        ("{{ (range(90000) | list) * 1000000 }}", EITHER),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% "
            "endfor %}",
            EITHER,
        ),
        ("{{ 7 ** (7 ** 11) }}", EITHER),
        ("{{ '{:>9000000000}'.format(1) }}", EITHER),
    ],
)
def test_endless_and_growing_templates_say_which_limit_ends_them(text: str, limit: str) -> None:
    started = time.monotonic()
    endless = template(text, seconds=1)
    with pytest.raises(ConfigError, match=limit):
        endless.render(MESSAGES)
    assert time.monotonic() - started < 60, "it would have gone on for hours"
    assert endless._process is None or endless._process.poll() is None


def test_a_chat_goes_on_after_a_refusal() -> None:
    tokenizer = SimpleNamespace(
        chat_template="{{ raise_exception('never') }}", special_tokens_map={}
    )
    talk = Chat(SimpleNamespace(config=SimpleNamespace()), tokenizer, ChatOptions())
    for message in ("hello", "again"):
        with pytest.raises(ConfigError, match="refuses the conversation: never"):
            talk.answer(message)
    assert talk.messages == []


def test_threads_get_their_own_conversations() -> None:
    shared = template("{{ messages[0].content }}")
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda text: shared.render([{"role": "user", "content": text}]),
                map(str, range(200)),
            )
        )
    shared.close()
    assert found == list(map(str, range(200)))
