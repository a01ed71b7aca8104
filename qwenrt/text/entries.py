"""Files of texts and conversations: a JSON list, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenrt.config.fields import has_more_values
from qwenrt.errors import RequestError
from qwenrt.files import read

MAX_DATA_BYTES = 2**30
MAX_DATA_VALUES = 16 * 10**6
Place = int | str  # of an entry: its number, or its file and number


def read_entries(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a JSON list or of JSON lines (one object a line). RequestError names the line."""
    path = Path(path)
    asked = f"training data {path}"
    raw = read(path, MAX_DATA_BYTES, RequestError, asked=asked, what="file that fits into memory: split it")
    if has_more_values(raw, MAX_DATA_VALUES):
        raise RequestError(asked, f"more than {MAX_DATA_VALUES} JSON values", "Split it.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = raw[: error.start].count(b"\n") + 1
        raise RequestError(
            f"training data {path}", f"line {where} is not UTF-8", "Save it as UTF-8."
        ) from error
    if not text.lstrip().startswith("{"):
        return _parse_list(path, text)
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                found = f"line {number} is not JSON ({str(error)[:80]})"
                raise RequestError(f"training data {path}", found, "Correct that line.") from error
    return entries


class Entries(list[Any]):
    """Entries of files. ``files``: (how many entries are before it, file) in turn."""

    def __init__(self, files: Iterable[tuple[Path, list[Any]]]) -> None:
        super().__init__()
        self.files: list[tuple[int, Path]] = []
        for file, entries in files:
            self.files.append((len(self), file))
            self += entries

    def where(self, number: int) -> str:
        """The file of the entry that is the ``number``-th of all, from 1 on, and its number there."""
        before, file = next(each for each in reversed(self.files) if each[0] < number)
        return f"{file}, entry {number - before}"


def read_all_entries(data: str | Path | Sequence[Any]) -> list[Any]:
    """The entries of a file, of all .json and .jsonl files of a directory in the order of their names, of several of
    these, or given as they are. RequestError names the file."""
    given = [data] if isinstance(data, (str, Path)) else data
    if not given or not all(isinstance(value, (str, Path)) for value in given):
        return list(given)
    return Entries((file, read_entries(file)) for value in given for file in _files_in(Path(value)))


def _files_in(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
    if not files:
        raise RequestError(f"training data {path}", "no .json or .jsonl file in it", "Put some there.")
    return files


def unknown_keys(entries: Iterable[object]) -> list[str]:
    """Keys of entries that mean nothing here, each once."""
    found = {str(key) for entry in entries if isinstance(entry, dict) for key in entry if key not in _KEYS}
    return sorted(found)


def _parse_list(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        number = getattr(error, "lineno", 1)
        found = f"line {number} is not JSON ({str(error)[:80]})"
        raise RequestError(
            f"training data {path}", found, "Correct it, or write one entry a line."
        ) from error
    if not isinstance(entries, list):
        found = f"a JSON {type(entries).__name__}"
        raise RequestError(f"training data {path}", found, "It must be a list of entries.")
    return entries


@dataclass(frozen=True)
class Entry:
    """One entry of a file: a plain ``text``, or a conversation in OpenAI's shape, as `LLM.chat` takes it, and the
    ``tools`` that it had."""

    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


_KEYS = {
    *("id", "text", "conversations", "messages", "system", "tools", "instruction", "input", "output"),
    "history",
}
_SHAPES = (
    'Give {"messages": [{"role": "user", "content": "..."}, ...]}, '
    '{"conversations": [{"from": "user", "value": "..."}, ...]}, '
    '{"instruction": "...", "output": "..."} or {"text": "..."}.'
)
# ShareGPT's names of who speaks, and those of the first Qwen's own files.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "function_call": "call",
}
_FIRST_QWENS = {"user", "assistant"}
_ROLES = ("system", "user", "assistant", "tool")


def entry_of(value: object, place: Place = 1) -> Entry:
    """An entry in whichever of these shapes it has: OpenAI's ("messages"), ShareGPT's or the first Qwen's
    ("conversations"), Alpaca's ("instruction", "output"), or "text". RequestError names its ``place``."""
    if not isinstance(value, dict):
        raise bad_entry(place, f"a JSON {type(value).__name__}", "Each entry must be an object.")
    if "text" in value:
        return Entry(text=_string(value["text"], place, "text"))
    if isinstance(value.get("conversations"), list) and value["conversations"]:
        messages = _conversation(value["conversations"], place)
        if isinstance(value.get("system"), str) and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": value["system"]})
    elif isinstance(value.get("messages"), list) and value["messages"]:
        messages = _openai(value["messages"], place)
    elif "output" in value and "instruction" in value:
        messages = _alpaca(value, place)
    else:
        raise bad_entry(place, "no list of conversations", _SHAPES)
    if not messages:
        raise bad_entry(place, "nobody says anything in it", "Remove the entry.")
    return Entry(tuple(messages), tuple(_tools(value.get("tools"), place)))


def bad_entry(place: Place, found: str, remedy: str) -> RequestError:
    where = f", entry {place}" if isinstance(place, int) else f" {place}"
    return RequestError(f"training data{where}", found, remedy)


def _openai(turns: list[Any], place: Place) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        where = f"messages[{index}]"
        role = _object(turn, place, where).get("role")
        if role not in _ROLES or (role == "system" and index > 0):
            raise bad_entry(place, f"{where} is from {role!r:.40}", "It must be 'user' or 'assistant'.")
        if role == "tool" and not any(before.get("tool_calls") for before in messages):
            raise bad_entry(
                place, f"{where} is from 'tool', and no call is before it", "Put the call before it."
            )
        turn = {**turn, "content": _text_parts(turn.get("content"), place, where)}
        if not turn.get("tool_calls"):
            _string(turn["content"], place, f"{where} content")
        messages.append(turn)
    return messages


def _text_parts(content: Any, place: Place, where: str) -> Any:
    """Contents that are a list of text parts, joined; others as they are."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise bad_entry(
                place, f"{where} has a part of type {kind!r:.40}", "Only texts are read: remove it."
            )
    return "".join(part["text"] for part in content)


def _conversation(turns: list[Any], place: Place) -> list[dict[str, Any]]:
    objects = [_object(turn, place, f"conversations[{i}]") for i, turn in enumerate(turns)]
    said = [str(turn.get("from")) for turn in objects]
    # one leading turn of another role is dropped in the first Qwen's shape, as its trainer does
    first = 1 if said[0] not in _FIRST_QWENS and {*said[1:]} <= _FIRST_QWENS and said[1:] else 0
    if first == 0 and said[0] == "assistant" and {*said} <= _FIRST_QWENS:
        first = 1
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns[first:], first):
        where, role = f"conversations[{index}]", _SPEAKERS.get(said[index])
        if role is None or (role == "system" and index > 0):
            raise bad_entry(
                place, f"{where} is from {turn.get('from')!r:.40}", "It must be 'user' or 'assistant'."
            )
        value = _string(turn.get("value"), place, f"{where} value")
        messages.append(_call(value, place, where) if role == "call" else {"role": role, "content": value})
    return messages


def _call(value: str, place: Place, where: str) -> dict[str, Any]:
    """ShareGPT's turn of a call, a JSON object or a list of them, as a message of the assistant."""
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise bad_entry(
            place, f"{where} is no JSON ({str(error)[:60]})", "Write the call as JSON."
        ) from error
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise bad_entry(
            place, f"{where} is a call without a name", 'Write {"name": "...", "arguments": {...}}.'
        )
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }


def _alpaca(value: dict[str, Any], place: Place) -> list[dict[str, Any]]:
    messages = []
    if value.get("system"):
        messages.append({"role": "system", "content": _string(value["system"], place, "system")})
    for index, pair in enumerate(value.get("history") or ()):
        if not isinstance(pair, list) or len(pair) != 2:
            raise bad_entry(place, f"history[{index}] is no pair", "Give [question, answer].")
        asked, answered = (_string(text, place, f"history[{index}]") for text in pair)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    asked, given = _string(value["instruction"], place, "instruction"), value.get("input") or ""
    prompt = f"{asked}\n{_string(given, place, 'input')}" if given else asked
    answer = _string(value["output"], place, "output")
    return [*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _tools(value: object, place: Place) -> list[dict[str, Any]]:
    if isinstance(value, str):  # ShareGPT's files have them as JSON text
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            found = f"its tools are no JSON ({str(error)[:60]})"
            raise bad_entry(place, found, "Give a list of functions.") from error
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise bad_entry(place, "its tools are no list of objects", "Give a list of functions.")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]


def _object(value: object, place: Place, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_entry(place, f"{where} is a JSON {type(value).__name__}", "It must be an object.")
    return value


def _string(value: object, place: Place, what: str) -> str:
    if not isinstance(value, str):
        raise bad_entry(place, f"{what} is {type(value).__name__}, not text", "Give a string.")
    return value
