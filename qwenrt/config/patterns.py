"""Regular expressions from files, matched in bounded time.

Python's own ``re`` tries one way after the other, and a pattern can be made for which that takes for ever. Here a part
of a pattern takes the set of all places where it may begin, as the bits of one integer, to the set of those where it
may end. What this cannot say (back references, look-behind, flags) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from qwenrt.errors import ConfigError, shown

MAX_LENGTH = 1000  # characters of a pattern
_MAX_DEPTH = 40  # brackets within brackets
_MAX_TEXT = 1000  # characters of a name
_MAX_COUNT = 1000  # of a {n}
_MAX_WORK = 50_000  # parts looked at for one text: milliseconds
_CLASSES = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_REMEDY = "Write it with plain names, or with . [] () | * + ? {} (?=) (?!) and \\d \\w \\s \\b only."


class _Work:
    """One text while it is matched."""

    def __init__(self, text: str) -> None:
        self.text, self.left = text, _MAX_WORK

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _TooMuch


class _TooMuch(Exception):
    pass


# the places where a part may begin -> those where it may end
_Part = Callable[[_Work, int], int]


@dataclass(frozen=True)
class Pattern:
    """A regular expression of the setting ``where``. Raises ConfigError where it is not one, or is refused."""

    source: str
    where: str

    def __post_init__(self) -> None:
        if len(self.source) > MAX_LENGTH:
            raise self._bad(f"it has {len(self.source)} characters; at most {MAX_LENGTH} are allowed")
        object.__setattr__(self, "_whole", _Parser(self).parse())
        object.__setattr__(self, "_end", _end_of(self.source))

    def matches(self, text: str) -> bool:
        """Whether it matches ``text`` from the beginning to the end. Raises ConfigError where finding out takes too
        much."""
        whole: _Part = self._whole  # type: ignore[attr-defined]
        end: str = self._end  # type: ignore[attr-defined]
        if not text.endswith(end):
            return False
        try:
            return len(text) <= _MAX_TEXT and bool(whole(_Work(text), 1) >> len(text) & 1)
        except _TooMuch:
            raise self._bad(f"it takes too much work for {shown(text)}") from None

    def _bad(self, found: str) -> ConfigError:
        return ConfigError(f"the pattern {shown(self.source)} in {self.where}", found, _REMEDY)


def _end_of(source: str) -> str:
    """Letters that every text ends with that a pattern fits: most names are told apart by them alone."""
    found = re.search(r"(\\?)([A-Za-z0-9_]*)[)$]*$", source)
    if found is None or "|" in source:
        return ""
    return found[2][1:] if found[1] else found[2]  # what a backslash stands before means something else


class _Parser:
    def __init__(self, pattern: Pattern) -> None:
        self._pattern, self._source, self._at, self._depth = pattern, pattern.source, 0, 0

    def parse(self) -> _Part:
        whole = self._either()
        if self._at < len(self._source):
            raise self._bad("a ) closes nothing")
        return whole

    def _bad(self, found: str) -> ConfigError:
        return self._pattern._bad(f"{found}, at character {self._at}")

    def _peek(self, word: str) -> bool:
        return self._source.startswith(word, self._at)

    def _take(self, word: str) -> bool:
        found = self._peek(word)
        self._at += len(word) * found
        return found

    def _next(self) -> str:
        if self._at >= len(self._source):
            raise self._bad("it ends too early")
        self._at += 1
        return self._source[self._at - 1]

    def _either(self) -> _Part:
        ways = [self._sequence()]
        while self._take("|"):
            ways.append(self._sequence())
        return ways[0] if len(ways) == 1 else _either(ways)

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        while self._at < len(self._source) and not (self._peek("|") or self._peek(")")):
            parts.append(self._repeated(self._atom()))
        return _sequence(parts)

    def _repeated(self, part: _Part) -> _Part:
        while True:
            if self._take("*"):
                least, most = 0, None
            elif self._take("+"):
                least, most = 1, None
            elif self._take("?"):
                least, most = 0, 1
            elif self._peek("{"):
                least, most = self._counts()
            else:
                return part
            self._take("?")  # the shortest first: the same texts
            if self._peek("+"):
                raise self._bad("it has a possessive repetition")
            part = _repeated(part, least, most)

    def _counts(self) -> tuple[int, int | None]:
        end = self._source.find("}", self._at)
        low, comma, high = self._source[self._at + 1 : max(end, self._at)].partition(",")
        if not (low or "0").isdecimal() or not (high or "0").isdecimal() or not (low or high):
            raise self._bad("a { begins no count")
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if max(least, most or 0) > _MAX_COUNT or (most is not None and most < least):
            raise self._bad(f"a count is above {_MAX_COUNT}, or its ends are the wrong way round")
        self._at = end + 1
        return least, most

    def _atom(self) -> _Part:
        letter = self._next()
        if letter == "(":
            return self._group()
        if letter == "[":
            return self._set()
        if letter == "^":
            return lambda work, starts: starts & 1
        if letter == "$":
            return lambda work, starts: starts & 1 << len(work.text)
        if letter == ".":
            return _one(lambda c: c != "\n")
        if letter in "*+?{":
            raise self._bad("there is nothing to repeat")
        if letter == "\\" and self._take("b"):
            return _at_word_end
        if letter == "\\" and self._take("Z"):
            return lambda work, starts: starts & 1 << len(work.text)
        return _one(self._escaped() if letter == "\\" else _is(letter))

    def _group(self) -> _Part:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._bad(f"more than {_MAX_DEPTH} brackets within each other")
        ahead: bool | None = None
        if self._take("?"):
            if self._take("=") or self._peek("!"):
                ahead = not self._take("!")
            elif self._take("P<"):
                while self._next() != ">":
                    pass
            elif not self._take(":"):
                raise self._bad("(? begins what is not supported")
        inner = self._either()
        if not self._take(")"):
            raise self._bad("a ( is not closed")
        self._depth -= 1
        return inner if ahead is None else _ahead(inner, ahead)

    def _escaped(self) -> Callable[[str], bool]:
        letter = self._next()
        known = _CLASSES.get(letter.lower())
        if known is not None:
            return known if letter.islower() else _not(known)
        if letter.isalnum():
            raise self._bad(f"\\{letter} is not supported")
        return _is(letter)

    def _set(self) -> _Part:
        outside, tests = self._take("^"), list[Callable[[str], bool]]()
        while not tests or not self._peek("]"):
            low = self._next()
            if low == "\\":
                tests.append(self._escaped())
            elif self._peek("-") and not self._peek("-]"):
                self._at += 1
                tests.append(_between(low, self._next()))
            else:
                tests.append(_is(low))
        self._at += 1
        return _one(_any(tests, not outside))


def _is(letter: str) -> Callable[[str], bool]:
    return lambda c: c == letter


def _not(test: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda c: not test(c)


def _between(low: str, high: str) -> Callable[[str], bool]:
    return lambda c: low <= c <= high


def _any(tests: list[Callable[[str], bool]], wanted: bool) -> Callable[[str], bool]:
    return lambda c: any(test(c) for test in tests) == wanted


def _one(test: Callable[[str], bool]) -> _Part:
    """One character that passes the test."""

    def part(work: _Work, starts: int) -> int:
        work.spend()
        ends, left = 0, starts & (1 << len(work.text)) - 1
        while left:
            place = left & -left  # the lowest bit
            left ^= place
            if test(work.text[place.bit_length() - 1]):
                ends |= place << 1
        return ends

    return part


def _sequence(parts: list[_Part]) -> _Part:
    def whole(work: _Work, starts: int) -> int:
        work.spend()
        for part in parts:
            starts = part(work, starts) if starts else 0
        return starts

    return whole


def _either(ways: list[_Part]) -> _Part:
    def whole(work: _Work, starts: int) -> int:
        ends = 0
        for way in ways:
            ends |= way(work, starts)
        return ends

    return whole


def _repeated(part: _Part, least: int, most: int | None) -> _Part:
    def whole(work: _Work, starts: int) -> int:
        for _ in range(least):
            work.spend()
            starts = part(work, starts) if starts else 0
        ends, new, count = starts, starts, least
        while new and (most is None or count < most):
            work.spend()
            new = part(work, new) & ~ends
            ends |= new
            count += 1
        return ends

    return whole


def _ahead(part: _Part, wanted: bool) -> _Part:
    def whole(work: _Work, starts: int) -> int:
        kept = 0
        for i in range(len(work.text) + 1):
            work.spend()
            if starts >> i & 1 and bool(part(work, 1 << i)) == wanted:
                kept |= 1 << i
        return kept

    return whole


def _at_word_end(work: _Work, starts: int) -> int:
    inside = [False, *(c.isalnum() or c == "_" for c in work.text), False]
    return sum(1 << i for i in range(len(work.text) + 1) if starts >> i & 1 and inside[i] != inside[i + 1])
