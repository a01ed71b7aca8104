"""Entries of files of conversations: the shapes that people have, told apart one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.errors import RequestError
from qwenrt.text.entries import entry_of, read_entries

ASKED = {"role": "user", "content": "Hi"}
ANSWERED = {"role": "assistant", "content": "Hello!"}
ASKED_SHORT = {"from": "human", "value": "Hi"}
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": [ASKED, ANSWERED]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "id": 7},
        {"instruction": "Hi", "output": "Hello!", "input": ""},
        # the first Qwen's trainer drops a leading turn of another role
        {"conversations": [{"from": "system", "value": "x"}, {"from": "user", "value": "Hi"},
                           {"from": "assistant", "value": "Hello!"}]},
    ],
)  # fmt: skip
def test_one_conversation_in_all_shapes(entry: dict[str, Any]) -> None:
    assert list(entry_of(entry).messages) == [ASKED, ANSWERED]


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": [SYSTEM, ASKED, ANSWERED]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}],
         "system": "Be short."},
        {"conversations": [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Hi"},
                           {"from": "gpt", "value": "Hello!"}]},
        {"instruction": "Hi", "output": "Hello!", "system": "Be short."},
    ],
)  # fmt: skip
def test_system_prompts(entry: dict[str, Any]) -> None:
    assert list(entry_of(entry).messages) == [SYSTEM, ASKED, ANSWERED]


def test_alpacas_input_and_history() -> None:
    entry = entry_of({"instruction": "Add.", "input": "2, 3", "output": "5", "history": [["Hi", "Hello!"]]})
    assert list(entry.messages) == [
        ASKED, ANSWERED, {"role": "user", "content": "Add.\n2, 3"}, {"role": "assistant", "content": "5"},
    ]  # fmt: skip


def test_sharegpts_calls_and_tools() -> None:
    tool = {"name": "look", "parameters": {"type": "object"}}
    said = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps({"name": "look", "arguments": {"at": "sky"}})},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    entry = entry_of({"conversations": said, "tools": json.dumps([tool])})
    assert [message["role"] for message in entry.messages] == ["user", "assistant", "tool", "assistant"]
    assert entry.messages[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "sky"}}
    assert list(entry.tools) == [{"type": "function", "function": tool}]


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ([], "a JSON list"),
        ({}, 'no list of conversations.*Give {"messages"'),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\] value is NoneType"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "is from \\['human'\\]"),
        ({"conversations": [{"from": "function_call", "value": "{"}, ASKED_SHORT]}, "no JSON"),
        ({"conversations": [{"from": "function_call", "value": "[1]"}, ASKED_SHORT]}, "without a name"),
        ({"messages": [ASKED, SYSTEM]}, r"messages\[1\] is from 'system'"),
        ({"messages": [ASKED, {"role": "tool", "content": "x"}]}, "no call is before it"),
        ({"messages": [ASKED, ANSWERED], "tools": "{"}, "tools are no JSON"),
        ({"messages": [ASKED, ANSWERED], "tools": [1]}, "no list of objects"),
        ({"instruction": "a", "output": 5}, "output is int"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, r"history\[0\] is no pair"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(entry: object, found: str) -> None:
    with pytest.raises(RequestError, match=f"entry 3: .*({found})"):
        entry_of(entry, 3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["user", "human", "gpt", "system", "x", "{}"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["messages", "conversations", "from", "value", "role", "content", "tools", "tool_calls",
                         "instruction", "output", "input", "history", "text", "system"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
def test_anything_is_an_entry_or_an_error(value: object) -> None:
    try:
        entry = entry_of(value)
    except RequestError:
        return
    assert (entry.text is None) == bool(entry.messages)


def test_files_with_marks_blank_lines_and_carriage_returns(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert [entry_of(value).text for value in read_entries(file)] == ["a", "b"]


def test_parts_of_text_are_joined_and_others_are_named():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]
    assert [message["content"] for message in entry_of({"messages": talk}).messages] == ["ab", "c"]
    talk[0]["content"] = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(RequestError, match=r"entry 3: messages\[0\] has a part of type 'image_url'"):
        entry_of({"messages": talk}, 3)
