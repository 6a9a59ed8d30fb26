"""The parts of an answer, and that their events tell the same."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.serve.api.anthropic.blocks import UNSIGNED, Blocks
from hybrimoe_plugin.serve.api.openai_responses.output import Output


def test_blocks_of_an_answer() -> None:
    blocks = Blocks()
    events = [
        *blocks.thinking("A "),
        *blocks.thinking("sum."),
        *blocks.text("Let me "),
        *blocks.text("add."),
        *blocks.tool_use("c1", "add"),
        *blocks.arguments('{"a":'),
        *blocks.arguments(" 1}"),
        *blocks.close(),
    ]
    assert blocks.content == [
        {"type": "thinking", "thinking": "A sum.", "signature": UNSIGNED},
        {"type": "text", "text": "Let me add."},
        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
    ]
    assert [(event["type"].removeprefix("content_block_"), event["index"]) for event in events] == [
        *(("start", 0), ("delta", 0), ("delta", 0), ("delta", 0), ("stop", 0)),
        *(("start", 1), ("delta", 1), ("delta", 1), ("stop", 1)),
        *(("start", 2), ("delta", 2), ("delta", 2), ("stop", 2)),
    ]


def test_thinking_that_is_not_shown_leaves_an_empty_block() -> None:
    blocks = Blocks()
    events = [*blocks.thinking("A sum.", shown=False), *blocks.close()]
    assert blocks.content == [{"type": "thinking", "thinking": "", "signature": UNSIGNED}]
    assert "A sum." not in str(events)


def test_items_of_an_answer() -> None:
    output = Output("1")
    events = [
        *output.reasoning("A "),
        *output.reasoning("sum."),
        *output.text("Let me "),
        *output.text("add."),
        *output.call("c1", "add"),
        *output.arguments('{"a":'),
        *output.arguments(" 1}"),
        *output.close(),
    ]
    assert [item["type"] for item in output.items] == ["reasoning", "message", "function_call"]
    assert [item["id"] for item in output.items] == ["rs_1_0", "msg_1_1", "fc_1_2"]
    thought, message, call = output.items
    assert thought["content"] == [{"type": "reasoning_text", "text": "A sum."}]
    assert message["content"][0]["text"] == "Let me add."
    assert (call["call_id"], call["arguments"]) == ("c1", '{"a": 1}')
    assert {item["status"] for item in output.items} == {"completed"}
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output.items


def test_every_event_names_its_item() -> None:
    output = Output("1")
    events = [*output.reasoning("x"), *output.text("y"), *output.call("c", "n"), *output.close()]
    named: dict[int, set[Any]] = {}
    for event in events:
        item_id = event.get("item_id") or event["item"]["id"]
        named.setdefault(event["output_index"], set()).add(item_id)
    assert named == {0: {"rs_1_0"}, 1: {"msg_1_1"}, 2: {"fc_1_2"}}


def test_an_item_that_was_cut_off_says_so() -> None:
    output = Output("1")
    output.text("Let")
    assert output.close("incomplete")[-1]["item"]["status"] == "incomplete"
    assert output.close() == []


def test_arguments_that_were_cut_off_are_none() -> None:
    blocks = Blocks()
    blocks.tool_use("c1", "add")
    blocks.arguments('{"a":')
    blocks.close()
    assert blocks.content[0]["input"] == {}
