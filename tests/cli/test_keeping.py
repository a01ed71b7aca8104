"""What a conversation leaves behind: where, for whose eyes, how much, and nothing where nothing is wanted."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenrt.cli import keeping
from qwenrt.cli.chat import _findable
from qwenrt.cli.keeping import Kept
from qwenrt.config import Console, Environment
from qwenrt.errors import ConfigError, RequestError
from qwenrt.text.chat import conversations
from qwenrt.text.chat.conversations import Conversation

Qwenrt = Callable[..., Any]
TALK = Conversation([("q", "a"), ("q2", "half an")], "S", frozenset({1}), "some/model")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_kept_is_reopened_and_its_owners_alone(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "state" / "qwenrt")
    kept.save(TALK)
    assert Kept(kept.directory).reopen() == TALK
    [file] = (kept.directory / "conversations").iterdir()
    lines = kept.typed_lines()
    assert lines is not None
    for path, expected in ((kept.directory, 0o700), (file.parent, 0o700), (file, 0o600), (lines, 0o600)):
        assert mode(path) == expected, path


def test_one_conversation_is_one_file_and_the_last_written_is_reopened(tmp_path: Path) -> None:
    first, second = Kept(tmp_path), Kept(tmp_path)
    first.save(Conversation([("one", "1")], None))
    second.save(Conversation([("two", "2")], None))
    for age, file in enumerate(
        sorted((tmp_path / "conversations").iterdir(), key=lambda p: "two" in p.read_text())
    ):
        os.utime(file, (1000 + age, 1000 + age))
    third = Kept(tmp_path)
    assert third.reopen().history == [("two", "2")]
    third.save(Conversation([("two", "2"), ("more", "3")], None))
    assert len(list((tmp_path / "conversations").iterdir())) == 2
    third.save(Conversation([], None))
    assert Kept(tmp_path).reopen().history == [("one", "1")], "an empty conversation is not kept"


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "MOST_CONVERSATIONS", 3)
    for number in range(5):
        Kept(tmp_path).save(Conversation([(str(number), "")], None))
        for file in (tmp_path / "conversations").iterdir():
            n = int(conversations.read(file).history[0][0])
            os.utime(file, (1000 + n, 1000 + n))
    left = {conversations.read(file).history[0][0] for file in (tmp_path / "conversations").iterdir()}
    assert left == {"2", "3", "4"}


def test_typed_lines_are_made_private_and_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "MOST_TYPED_BYTES", 60)
    path = tmp_path / "typed_lines"
    path.write_text("".join(f"\n# 2026-01-01\n+line {n}\n" for n in range(5)))
    path.chmod(0o644)
    assert Kept(tmp_path).typed_lines() == path and mode(path) == 0o600
    assert path.read_text() == "# 2026-01-01\n+line 4\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_what_is_no_file_of_ours_is_left_alone(kind: str, tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "typed_lines", tmp_path / "elsewhere"
    elsewhere.write_text("x" * 100)
    {"fifo": os.mkfifo, "directory": os.mkdir, "link": lambda p: p.symlink_to(elsewhere)}[kind](path)
    assert Kept(tmp_path).typed_lines() is None and elsewhere.read_text() == "x" * 100


def test_where_nothing_can_be_kept_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file" / "below")
    assert kept.typed_lines() is None
    with pytest.raises(
        RequestError, match=r"keeping this conversation in .*below: .*Use --no-history, or set QWENRT_"
    ):
        kept.save(TALK)
    with pytest.raises(RequestError, match="no conversation is kept in"):
        kept.reopen()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_STATE_HOME": "/s"}, "/s/qwenrt"),
        ({"XDG_STATE_HOME": "/s", "QWENRT_HISTORY": "1"}, "/s/qwenrt"),
        ({"XDG_STATE_HOME": "/s", "QWENRT_HISTORY": "/mine"}, "/mine"),
        ({"QWENRT_HISTORY": "0"}, None),
        ({"QWENRT_HISTORY": "off"}, None),
        ({}, str(Path.home() / ".local" / "state" / "qwenrt")),
    ],
)
def test_where_it_is_kept(environ: dict[str, str], expected: str | None) -> None:
    assert Environment.read(environ).history == (None if expected is None else Path(expected))


def test_a_home_that_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match=r"QWENRT_HISTORY: is '~nobody-here/kept'.*or to 0 to keep nothing"):
        Environment.read({"QWENRT_HISTORY": "~nobody-here/kept"})


@pytest.mark.parametrize(
    ("environ", "console"),
    [
        ({"TERM": "xterm"}, Console(True, True)),
        ({"TERM": "xterm", "NO_COLOR": "1"}, Console(True, False)),
        ({"TERM": "xterm", "NO_COLOR": ""}, Console(True, True)),
        ({"TERM": "dumb"}, Console(False, False)),
        ({}, Console(True, True)),
    ],
)
def test_what_a_terminal_may_be_sent(environ: dict[str, str], console: Console) -> None:
    assert Console.read(environ) == console


def test_a_pipe_goes_on_with_the_last_conversation_and_keeps_nothing(
    fake: SimpleNamespace, qwenrt: Qwenrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENRT_HISTORY", str(tmp_path))
    Kept(tmp_path).save(TALK)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    done = qwenrt("chat", "--continue", stdin="and then?\n", history=True)
    assert done.code == 0 and "Going on after 2 turns, the last of them: q2" in done.err
    assert fake.loaded[-1][0] == "some/model", "the model that it was held with"
    assert fake.llm.calls[-1]["history"] == TALK.history and fake.llm.calls[-1]["system"] == "S"
    qwenrt("chat", "demo", "--continue", "--system", "Other.", stdin="and then?\n", history=True)
    assert fake.loaded[-1][0] == "demo" and fake.llm.calls[-1]["system"] == "Other."
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_continue_without_a_history_is_refused(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", "--continue", "--no-history")
    assert done.code == 1 and "conversations are not kept" in done.err and not fake.loaded


def test_a_directory_is_found_again_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _findable("./my-model") == str((tmp_path / "my-model").resolve())
    assert _findable("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


@pytest.mark.parametrize("stopped", [[2], "x", [True], [-1], None])
def test_marks_of_stopped_answers_are_checked(stopped: Any, tmp_path: Path) -> None:
    path = conversations.save(tmp_path / "c.json", TALK.history, stopped=(1,), model="m")
    assert conversations.read(path).stopped == {1} and conversations.load(path)[0] == TALK.history
    path.write_text(path.read_text().replace("[\n  1\n ]", json.dumps(stopped)))
    with pytest.raises(RequestError, match=r"stopped is .*It must list places"):
        conversations.read(path)
