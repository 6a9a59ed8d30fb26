"""Conversations have one key for all their turns; replicas share keys, and few of them move."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_plugin.serve.scaling.affinity import FIRST_CHARACTERS, conversation_key, ranked

SYSTEM = {"role": "system", "content": "be brief"}
FIRST = {"role": "user", "content": "hello"}
LATER = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "and then?"}]


def key(fields: Any) -> str | None:
    return conversation_key(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"messages": [SYSTEM, FIRST]}, {"messages": [SYSTEM, FIRST, *LATER], "seed": 3}),
        ({"messages": [FIRST]}, {"messages": [FIRST, *LATER], "stream": True}),
        ({"system": "s", "messages": [FIRST]}, {"system": "s", "messages": [FIRST, *LATER]}),
        ({"instructions": "s", "input": "hello"}, {"instructions": "s", "input": [FIRST, *LATER]}),
        ({"prompt": "a" * 300}, {"prompt": "a" * 300 + "b"}),
        ({"prompt": list(range(80))}, {"prompt": list(range(90))}),
        ({"prompt": ["a", "b"]}, {"prompt": ["a", "c"]}),
        ({"prompt_cache_key": "k", "input": "a"}, {"prompt_cache_key": "k", "input": "b"}),
    ],
)
def test_turns_of_a_conversation_share_a_key(one: Any, two: Any) -> None:
    assert key(one) is not None
    assert key(one) == key(two)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"messages": [FIRST]}, {"messages": [SYSTEM, FIRST]}),
        ({"messages": [FIRST]}, {"messages": [{"role": "user", "content": "hello!"}]}),
        ({"system": "s", "messages": [FIRST]}, {"system": "t", "messages": [FIRST]}),
        ({"prompt": "a"}, {"prompt": "b"}),
        ({"prompt": [1, 23]}, {"prompt": [12, 3]}),
        ({"prompt_cache_key": "k", "input": "a"}, {"prompt_cache_key": "l", "input": "a"}),
    ],
)
def test_conversations_have_keys_of_their_own(one: Any, two: Any) -> None:
    assert key(one) != key(two)


def test_marks_for_caching_that_move_do_not_count() -> None:
    marked = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
    plain = {"type": "text", "text": "hello"}
    image = {"type": "image", "source": {"data": "AA"}}
    one = {"messages": [{"role": "user", "content": [marked, image]}]}
    two = {"messages": [{"role": "user", "content": [plain, {**image, "cache_control": {}}]}]}
    assert key(one) == key(two)


def test_the_clients_own_name_goes_first() -> None:
    named = conversation_key(b'{"prompt": "a"}', "me")
    assert named == conversation_key(b"anything", "me")
    assert named != conversation_key(b'{"prompt": "a"}')


def test_only_the_first_characters_of_a_prompt_count() -> None:
    beginning = "x" * FIRST_CHARACTERS
    assert key({"prompt": beginning + "one"}) == key({"prompt": beginning + "two"})


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"7", b"\xff", b"null", b"{}", b'{"prompt": []}', b'{"prompt": 3}'),
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000,
    ],
)
def test_bodies_without_a_conversation_have_no_key(body: bytes) -> None:
    assert conversation_key(body) is None


PLAIN = st.none() | st.booleans() | st.integers() | st.text()
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
NAMES = st.sampled_from(["messages", "input", "prompt", "system", "role", "content", "text"])


@given(st.dictionaries(NAMES, JSON | st.dictionaries(NAMES, JSON) | st.lists(JSON)))
def test_no_json_breaks_it(fields: Any) -> None:
    key(fields)


def test_half_a_character_has_a_key() -> None:
    assert conversation_key(b'{"prompt": "\\ud800"}') is not None


KEYS = [f"key {number}" for number in range(1000)]
REPLICAS = ["a", "b", "c", "d"]


def homes(replicas: list[str]) -> dict[str, str]:
    return {key: ranked(key, replicas)[0] for key in KEYS}


def test_keys_are_shared_evenly() -> None:
    found = list(homes(REPLICAS).values())
    assert all(200 < found.count(replica) < 300 for replica in REPLICAS)


def test_a_replica_that_leaves_gives_up_its_own_keys_alone() -> None:
    before, after = homes(REPLICAS), homes(REPLICAS[1:])
    assert all(after[key] == home for key, home in before.items() if home != "a")
    inherited = [after[key] for key, home in before.items() if home == "a"]
    assert set(inherited) == {"b", "c", "d"}


def test_a_replica_that_joins_takes_its_part_and_moves_no_other_key() -> None:
    before, after = homes(REPLICAS), homes([*REPLICAS, "e"])
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {"e"}
    assert 150 < len(moved) < 250


def test_the_order_of_replicas_is_nobodys_matter() -> None:
    assert ranked("key", REPLICAS) == ranked("key", REPLICAS[::-1])
    assert sorted(ranked("key", REPLICAS)) == REPLICAS
