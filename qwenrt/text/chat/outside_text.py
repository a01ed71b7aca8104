"""Untrusted texts on their way into a chat template, and the control tokens of what it renders (see provenance)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qwenrt.errors import RequestError
from qwenrt.text.template.budget import MAX_DEPTH
from qwenrt.text.template.provenance import own_runs, plain, with_ownership
from qwenrt.text.tokenizer.added_tokens import AddedTokenFinder

_THOUGHT_TAG = re.compile("</?think>")


def untrusted(value: Any, where: str, level: int = 0) -> Any:
    """A fresh copy of JSON-like data, its texts and keys plain. RequestError for what is not JSON."""
    if isinstance(value, str):
        return plain(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if level >= MAX_DEPTH - 10:
        raise RequestError(where, f"nested more than {level} deep", "It must be expressible as JSON.")
    if isinstance(value, Mapping):
        copied = {}
        for key, inner in value.items():
            if not isinstance(key, str):
                found = f"a key of type {type(key).__name__}"
                raise RequestError(where, found, "It must be expressible as JSON: keys are strings.")
            copied[plain(key)] = untrusted(inner, where, level + 1)
        return copied
    if isinstance(value, (list, tuple)):
        return [untrusted(inner, where, level + 1) for inner in value]
    found = f"Object of type {type(value).__name__} is not JSON serializable"
    raise RequestError(where, found, "It must be expressible as JSON.")


def assistant_text(value: str) -> str:
    """The text of an assistant's message: the tags of its thoughts count as written by the template."""
    value = plain(value)
    own = bytearray(len(value))
    for tag in _THOUGHT_TAG.finditer(value):
        own[tag.start() : tag.end()] = b"\1" * len(tag[0])
    return with_ownership(value, bytes(own))


def split_at_control_tokens(rendered: str, control: AddedTokenFinder) -> Iterator[tuple[str, int | None]]:
    """(text, id of the control token that the template wrote behind it) until (the rest, None)."""
    text, end = plain(rendered), 0
    for first, last in own_runs(rendered):
        for found in control.find(text[first:last]):
            yield text[end : first + found.start], found.id
            end = first + found.end
    yield text[end:], None
