"""A JSON value that arrives in pieces, read strictly and written anew in pieces, as write_json writes it."""

from __future__ import annotations

import re
from typing import Literal

from qwenrt.text.replies.strict_json import escaped, read_json, write_json

_State = Literal["value", "first_value", "first_key", "key", "colon", "after", "string", "escape", "word"]


class JsonRewriter:
    """Joined, what it gives is ``write_json(read_json(text))``, and at any time a beginning of that.

    A string is given as it comes, a key and a number at their end. The cost is linear in the text.

    done: the value is complete; a number is only when the character behind it was seen. broken: what was read
    begins no JSON value; a key twice, NaN, numbers out of range and what nests deeper than 500 count as that.
    """

    def __init__(self) -> None:
        self.done = self.broken = False
        self._state: _State = "value"
        self._keys: list[set[str] | None] = []  # of each open object; None for a list
        self._out: list[str] = []
        self._is_key = False  # the string that is read
        self._key: list[str] = []
        self._high = self._escape = ""  # half of a surrogate pair, and the escape that is read
        self._word: list[str] = []
        self._word_length = 0

    @property
    def in_string(self) -> bool:
        return self._state in ("string", "escape")

    def push(self, text: str, at: int = 0) -> int:
        """More text, from ``at`` on; returns where in it the reading ended: at its end, or where done or broken."""
        while at < len(text) and not self.done and not self.broken:
            if self._state == "string":
                at = self._in_string(text, at)
            elif self._state == "escape":
                at = self._in_escape(text, at)
            elif self._state == "word":
                at = self._in_word(text, at)
            else:
                at = self._between(text, at)
        return at

    def take(self) -> str:
        """What can be given since it was last asked for."""
        out, self._out = "".join(self._out), []
        return out

    def held(self) -> str:
        """What was read, and is not given, of the key, number or escape where it broke."""
        if self._state == "word":
            return "".join(self._word)
        key = '"' + escaped("".join(self._key)) if self._is_key and self.in_string else ""
        return key + escaped(self._high) + self._escape

    def _between(self, text: str, at: int) -> int:
        """Between keys and values: white space and marks."""
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            return at
        char = text[at]
        if self._state in ("first_key", "key"):
            known = self._begin_string(char, is_key=True) or (
                self._state == "first_key" and self._close(char)
            )
        elif self._state == "colon":
            known = self._mark(char, ":", ": ", "value")
        elif self._state == "after":
            after_comma: _State = "value" if self._keys[-1] is None else "key"
            known = self._mark(char, ",", ", ", after_comma) or self._close(char)
        elif _WORD.match(char):
            self._state, self._word, self._word_length = "word", [], 0
            return at
        else:
            known = self._begin_string(char, is_key=False) or self._open(char)
            known = known or (self._state == "first_value" and self._close(char))
        self.broken = not known
        return at + 1 if known else at

    def _mark(self, char: str, mark: str, written: str, then: _State) -> bool:
        if char != mark:
            return False
        self._out.append(written)
        self._state = then
        return True

    def _begin_string(self, char: str, is_key: bool) -> bool:
        if char != '"':
            return False
        self._state, self._is_key, self._key = "string", is_key, []
        if not is_key:
            self._out.append('"')
        return True

    def _open(self, char: str) -> bool:
        if char not in "{[" or len(self._keys) >= _DEEPEST:
            return False
        self._keys.append(set() if char == "{" else None)
        self._out.append(char)
        self._state = "first_key" if char == "{" else "first_value"
        return True

    def _close(self, char: str) -> bool:
        if char != ("]" if self._keys[-1] is None else "}"):
            return False
        self._keys.pop()
        self._out.append(char)
        self._ended()
        return True

    def _ended(self) -> None:
        self._state, self.done = "after", not self._keys

    def _in_string(self, text: str, at: int) -> int:
        end = _PLAIN.match(text, at).end()  # type: ignore[union-attr]
        if end > at:
            self._add(text[at:end])
        if end == len(text):
            return end
        if text[end] == "\\":
            self._state, self._escape = "escape", "\\"
            return end + 1
        self._add("")
        if not self._is_key:
            self._out.append('"')
            self._ended()
            return end + 1
        keys, key = self._keys[-1], "".join(self._key)
        assert keys is not None
        self.broken = key in keys
        if self.broken:
            return end
        keys.add(key)
        self._out.append(f'"{escaped(key)}"')
        self._state = "colon"
        return end + 1

    def _add(self, text: str) -> None:
        """Characters of the string, behind what waits for the second half of its pair."""
        text, self._high = self._high + text, ""
        if self._is_key:
            self._key.append(text)
        else:
            self._out.append(escaped(text))

    def _in_escape(self, text: str, at: int) -> int:
        char, length = text[at], len(self._escape)
        if length > 1 and char not in _HEX:
            self.broken = True
            return at
        if length == 1 and char not in _ESCAPES and char != "u":
            self.broken = True
            return at
        self._escape += char
        if length == 1 and char != "u":
            self._unescaped(_ESCAPES[char])
        elif length == 5:
            self._unescaped(chr(int(self._escape[2:], 16)))
        return at + 1

    def _unescaped(self, char: str) -> None:
        self._state, self._escape = "string", ""
        if self._high and "\udc00" <= char <= "\udfff":
            char, self._high = (self._high + char).encode("utf-16", "surrogatepass").decode("utf-16"), ""
        if "\ud800" <= char <= "\udbff":
            self._add("")
            self._high = char
        else:
            self._add(char)

    def _in_word(self, text: str, at: int) -> int:
        """A number, or true, false, null."""
        found = _WORD.match(text, at)
        if found:
            self._word.append(found[0])
            self._word_length += len(found[0])
            self.broken = self._word_length > _LONGEST_WORD
            return found.end()
        word = "".join(self._word)
        try:
            value, end = read_json(word)
            if end < len(word):
                raise ValueError("no JSON")
            self._out.append(write_json(value))
        except ValueError:
            self.broken = True
            return at
        self._ended()
        return at


_DEEPEST = 500  # what every client's reader takes
_LONGEST_WORD = 5000  # characters of a number; Python converts 4300 digits
_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\]*')
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
