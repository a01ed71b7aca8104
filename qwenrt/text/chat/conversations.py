"""A conversation's past: (user, assistant) pairs, and a file to keep them in."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenrt.arguments import as_integer
from qwenrt.config import read_json
from qwenrt.errors import ConfigError, RequestError, shown
from qwenrt.files import expanded
from qwenrt.text.chat.react import DEFAULT_SYSTEM
from qwenrt.text.tokenizer.unicode import without_surrogates

History = list[tuple[str, str]]
FORMAT = "qwenrt.conversation"
VERSION = 1
_PAIRS = "History is a list of (user, assistant) pairs of str, or of alternating messages."


@dataclass(frozen=True)
class Conversation:
    """What a file holds. system: None is the model's own. stopped: which of the answers were stopped by their reader,
    by their places in the history. model: the name it was held with, None where that was not kept."""

    history: History
    system: str | None
    stopped: frozenset[int] = frozenset()
    model: str | None = None


def as_history(history: object) -> History:
    """A fresh list of pairs from None, pairs (tuples or lists), or alternating user and assistant messages.

    Nothing of the caller's is kept or changed. Raises RequestError naming the entry that does not fit.
    """
    if history is None:
        return []
    if not isinstance(history, Sequence) or isinstance(history, (str, bytes)):
        raise RequestError("history", f"got {type(history).__name__}", _PAIRS)
    if any(isinstance(entry, Mapping) for entry in history):
        return _pairs_of_messages(history)
    pairs = []
    for index, entry in enumerate(history):
        ok = isinstance(entry, Sequence) and not isinstance(entry, (str, bytes)) and len(entry) == 2
        if not ok or not all(isinstance(text, str) for text in entry):
            raise RequestError(f"history[{index}]", f"got {shown(entry)}", _PAIRS)
        pairs.append((entry[0], entry[1]))
    return pairs


def save(
    path: str | Path,
    history: object,
    *,
    system: str | None = DEFAULT_SYSTEM,
    stopped: Collection[int] = (),
    model: str | None = None,
) -> Path:
    """Write a conversation as JSON; a file that is there is replaced in one step or left as it was. A new one can be
    read by its owner alone."""
    target = expanded(path, RequestError, asked=f"saving the conversation to {path}")
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "system": system,
        "history": [list(pair) for pair in as_history(history)],
    }
    if stopped:
        content["stopped"] = sorted(stopped)
    if model is not None:
        content["model"] = model
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    try:
        _replace(target, without_surrogates(text).encode("utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"saving the conversation to {target}",
            _reason(error),
            "Choose a file in a directory that exists and is writable.",
        ) from error
    return target


def load(path: str | Path) -> tuple[History, str | None]:
    """(history, system; None: the model's own) of a file that save() wrote. Raises RequestError for anything else."""
    conversation = read(path)
    return conversation.history, conversation.system


def read(path: str | Path) -> Conversation:
    """All of a file that save() wrote. Raises RequestError for anything else."""
    source = expanded(path, RequestError, asked=f"loading a conversation from {path}")
    asked, remedy = f"loading a conversation from {source}", "Give a file that qwenrt saved."
    try:
        content = read_json(source)
    except ConfigError as error:
        raise RequestError(asked, error.found, remedy) from error
    if content.get("format") != FORMAT:
        raise RequestError(asked, f"its format is {shown(content.get('format'))}, not {FORMAT!r}", remedy)
    if content.get("version") != VERSION:
        found = f"it has version {shown(content.get('version'))}, this qwenrt reads {VERSION}"
        raise RequestError(asked, found, "Update qwenrt.")
    for name in ("system", "model"):
        if not isinstance(content.get(name), str | None):
            raise RequestError(asked, f"{name} is {shown(content[name])}", "It must be text or null.")
    try:
        history = as_history(content.get("history"))
    except RequestError as error:
        raise RequestError(asked, f"{error.asked}: {error.found}", error.remedy) from error
    stopped = content.get("stopped", [])
    places = [as_integer(place) for place in stopped] if isinstance(stopped, list) else [None]
    if not all(place is not None and 0 <= place < len(history) for place in places):
        raise RequestError(asked, f"stopped is {shown(stopped)}", "It must list places in the history.")
    return Conversation(
        history, content.get("system"), frozenset(p for p in places if p is not None), content.get("model")
    )


def _pairs_of_messages(messages: Sequence[Any]) -> History:
    texts: list[str] = []
    for index, message in enumerate(messages):
        wanted = "assistant" if len(texts) % 2 else "user"
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role != wanted or not isinstance(content, str):
            remedy = (
                "Pass the system text as system=."
                if isinstance(role, str) and role == "system"
                else f"Expected a message with role {wanted!r} and a str as content."
            )
            raise RequestError(f"history[{index}]", f"got {shown(message)}", remedy)
        texts.append(content)
    if len(texts) % 2:
        raise RequestError(
            "history", f"{len(texts)} messages, the last without an answer", "Pass it as the query instead."
        )
    return list(zip(texts[::2], texts[1::2], strict=True))


def _replace(target: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".conversation-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
