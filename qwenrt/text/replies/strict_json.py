"""JSON as models write it, read strictly and written so that it can be sent."""

from __future__ import annotations

import json
import re
from typing import Any

_JSON = json.JSONDecoder(
    strict=False,  # models write raw newlines into strings; what they mean is plain
    parse_constant=lambda name: refuse_constant(name),
    object_pairs_hook=lambda pairs: unique_keys(pairs),
)


def read_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at ``start`` and where it ends. ValueError for anything that is not JSON.

    An object with a key twice is refused too: which value is meant is unknown, and reading it would lose one.
    """
    try:
        return _JSON.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(value: Any) -> str:
    """The value as JSON that can be sent as UTF-8. ValueError where there is none (a number out of range)."""
    try:
        return _sendable(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def escaped(text: str) -> str:
    """The text as it stands in a JSON string of write_json, without the quotes. Of two texts, one after the other, it
    is what it is of both together."""
    return _sendable(_AS_STRING(text)[1:-1])


def _sendable(text: str) -> str:
    """Half a surrogate pair, which the model wrote as an escape, stays one."""
    return text if text.isascii() else _HALF_PAIR.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the pairs. ValueError where a key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def refuse_constant(name: str) -> None:
    """ValueError for NaN and Infinity, which Python's reader accepts."""
    raise ValueError(f"{name} is not JSON")


_AS_STRING = json.JSONEncoder(ensure_ascii=False).encode
_HALF_PAIR = re.compile("[\ud800-\udfff]")
