"""Text from outside inside a rendered template: marked, so that no token form in it is taken for the template's own.

A template is text with gaps. What it writes itself is parsed for control tokens; what a user, a tool or a tool's
schema says must not be, wherever the template puts it and whatever it writes around it (`'<' ~ name ~ '>'`).
So a mark, a private-use character that occurs nowhere in the conversation, is put into such text before rendering
and taken out after the forms have been looked for. Only a template that looks inside a text can notice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from qwenrt.errors import RequestError
from qwenrt.text.added_tokens import FormFinder
from qwenrt.text.template_budget import MAX_DEPTH

_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
THOUGHT_TAGS = ("<think>", "</think>")


class OutsideText:
    """Marks outside text so that none of the ``added_tokens`` (form -> id) can be formed with it.

    Two rules. Behind every character that begins a form there is a mark: no form begins in outside text, even if
    the template cuts it, joins it or changes its case. Where a text begins with the rest of a form (``think>``),
    or is the inside of one (the name ``think``), there is a mark in front: no form ends in it either.

    One-character forms cannot be broken by a mark; `encode` never takes them for tokens.
    """

    def __init__(self, added_tokens: Mapping[str, int], conversation: object) -> None:
        self._ids = {form: i for form, i in added_tokens.items() if len(form) > 1}
        taken: set[str] = set()
        for text in _strings(conversation):
            taken.update(text)
        free = (c for c in map(chr, chain(*_PRIVATE)) if c not in taken)
        mark = next(free, None)
        if mark is None:
            raise RequestError("messages", "they hold every private-use character there is", "Send text.")
        self.mark = mark
        forms = [form.lower() for form in self._ids]
        self._rests = tuple({form[i:] for form in forms for i in range(1, len(form))})
        self._insides = [(form, max(re.findall(r"\w*", form), key=len)) for form in forms]
        starts = "".join(re.escape(c) for c in {form[0] for form in self._ids})
        self._start = re.compile(f"()[{starts}]", re.IGNORECASE) if starts else None
        tags = "|".join(tag for tag in THOUGHT_TAGS if tag in self._ids)
        self._start_or_tag = (
            re.compile(f"({tags})|[{starts}]", re.IGNORECASE) if tags and starts else self._start
        )

    def text(self, value: str) -> str:
        """A text that nobody vouches for."""
        return self._marked(value, self._start)

    def speech(self, value: str) -> str:
        """The assistant's own words: a template may find the tags of its thoughts in them."""
        return self._marked(value, self._start_or_tag)

    def data(self, value: Any, where: str) -> Any:
        """A fresh copy of JSON-like data, its texts and keys marked. RequestError for what is not JSON."""
        return self._copied(value, where, 0)

    def segments(self, rendered: str) -> Iterable[tuple[str, int | None]]:
        """(text without marks, id of the added token that the template wrote behind it) until (rest, None)."""
        for text, token_id in FormFinder(self._ids).split(rendered):
            yield self.unmarked(text), token_id

    def unmarked(self, text: str) -> str:
        return text.replace(self.mark, "")

    def _marked(self, value: str, start: re.Pattern[str] | None) -> str:
        if start is None:
            return value
        ends_a_form = value.lstrip()[:512].lower().startswith(self._rests)
        value = start.sub(lambda found: found[0] if found[1] else found[0] + self.mark, value)
        return self._fenced(value) if ends_a_form else value

    def _fenced(self, value: str) -> str:
        """The mark goes behind leading blanks: a template may cut these off."""
        blank = len(value) - len(value.lstrip())
        return value[:blank] + self.mark + value[blank:]

    def _word(self, value: str) -> str:
        """A text of a schema or a call, or a key: templates write tags out of these."""
        inside = value[:512].strip().lower()
        if inside and any(core in inside and inside in form for form, core in self._insides):
            return self._fenced(self.text(value))
        return self.text(value)

    def _copied(self, value: Any, where: str, level: int) -> Any:
        if isinstance(value, str):
            return self._word(str(value))
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
                copied[self._word(str(key))] = self._copied(inner, where, level + 1)
            return copied
        if isinstance(value, (list, tuple)):
            return [self._copied(inner, where, level + 1) for inner in value]
        found = f"Object of type {type(value).__name__} is not JSON serializable"
        raise RequestError(where, found, "It must be expressible as JSON.")


def _strings(value: object) -> Iterable[str]:
    """All texts and keys in JSON-like data. What is endless or not JSON is refused when it is copied."""
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        item, level = waiting.pop()
        if isinstance(item, str):
            yield item
        elif level < MAX_DEPTH:
            if isinstance(item, Mapping):
                waiting += [(inner, level + 1) for pair in item.items() for inner in pair]
            elif isinstance(item, (list, tuple)):
                waiting += [(inner, level + 1) for inner in item]
