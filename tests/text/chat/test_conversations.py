"""History in every form a caller may hold it, and conversations on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.errors import RequestError
from qwenrt.text.chat.conversations import as_history, load, save
from qwenrt.text.chat.react import DEFAULT_SYSTEM

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_every_form_gives_fresh_pairs() -> None:
    given_pairs = [("q", "a")]
    for history in (given_pairs, [["q", "a"]], (("q", "a"),), MESSAGES):
        assert as_history(history) == [("q", "a")]
    copy = as_history(given_pairs)
    copy.append(("x", "y"))
    assert given_pairs == [("q", "a")]
    assert as_history(None) == as_history([]) == as_history(()) == []


@pytest.mark.parametrize(
    ("history", "text"),
    [
        ("qa", "history: got str"),
        (3, "history: got int"),
        ([("q", "a"), "qa"], "history[1]: got 'qa'"),
        ([("q",)], "history[0]: got ('q',)"),
        ([("q", None)], "history[0]: got ('q', None)"),
        ([MESSAGES[1]], "history[0]: got {'role': 'assistant', 'content': 'a'}"),
        ([*MESSAGES, ("q", "a")], "history[2]: got ('q', 'a')"),
        ([{"role": "system", "content": "s"}], "Pass the system text as system=."),
        ([MESSAGES[0]], "history: 1 messages, the last without an answer"),
        ([{"role": "user", "content": None}], "history[0]: got"),
    ],
)
def test_refused_history(history: Any, text: str) -> None:
    with pytest.raises(RequestError) as error:
        as_history(history)
    assert text in str(error.value)
    assert error.value.remedy


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.text(max_size=10), st.text(max_size=10)), max_size=4),
    st.none() | st.text(max_size=10),
)
def test_what_was_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, str]], system: str | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "会话 1.json"
    assert save(path, history, system=system) == path
    assert load(path) == (history, system)


def test_the_file_is_readable_and_versioned(tmp_path: Path) -> None:
    path = save(tmp_path / "c.json", [("你好", "a\ud800")])
    text = path.read_text(encoding="utf-8")
    assert "你好" in text
    assert json.loads(text) == {
        "format": "qwenrt.conversation",
        "version": 1,
        "system": DEFAULT_SYSTEM,
        "history": [["你好", "a\ufffd"]],
    }
    assert os.listdir(tmp_path) == ["c.json"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "c.json", [("q", "a")])
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RequestError, match=r"saving the conversation to .*c\.json: No space left on device"):
        save(path, [("new", "text")])
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.json"]


def test_a_home_that_there_is_not_is_named() -> None:
    with pytest.raises(
        RequestError, match=r"saving the conversation to ~nobody-here/c: there is no such home"
    ):
        save("~nobody-here/c", [])
    with pytest.raises(RequestError, match=r"conversation from ~nobody-here/c: there is no such home"):
        load("~nobody-here/c")


def test_save_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"No such file or directory\. Choose a file in a directory"):
        save(tmp_path / "none" / "c.json", [])
    with pytest.raises(RequestError, match="saving the conversation"):
        save(tmp_path, [])
    with pytest.raises(RequestError, match="saving the conversation"):
        save(tmp_path / "nul\0byte", [])
    with pytest.raises(RequestError, match="loading a conversation"):
        load(tmp_path / "nul\0byte")
    assert os.listdir(tmp_path) == []


GOOD = {"format": "qwenrt.conversation", "version": 1, "system": "s", "history": [["q", "a"]]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "an empty file"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "a JSON list, not an object"),
        (b"\xff\xfe", "not valid JSON"),
        ({"messages": []}, "its format is None, not 'qwenrt.conversation'"),
        ({**GOOD, "version": 2}, "it has version 2, this qwenrt reads 1. Update qwenrt."),
        ({**GOOD, "system": 3}, "system is 3"),
        ({**GOOD, "history": [["q"]]}, "history[0]: got ['q']"),
        ({**GOOD, "history": "q"}, "history: got str"),
    ],
)
def test_refused_files(tmp_path: Path, content: Any, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(RequestError) as error:
        load(path)
    assert text in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"gone\.json: no such file"):
        load(tmp_path / "gone.json")


@settings(deadline=None, max_examples=50)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(["format", "version", "system", "history", "role"]), inner, max_size=4
            ),
        ),
    )
)
def test_any_json_is_loaded_or_refused(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    content = {**GOOD, **value} if isinstance(value, dict) else {**GOOD, "history": value}
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        history, system = load(path)
    except RequestError:
        return
    assert (system is None or isinstance(system, str)) and all(
        isinstance(t, str) for pair in history for t in pair
    )
