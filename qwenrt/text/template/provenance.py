"""Rendered text that knows which of its characters the template wrote itself, and which are untrusted.

Control tokens are looked for in what a template writes, and never in what a user, a tool or a tool's schema says,
wherever the template puts it and whatever it writes around it (`'<' ~ name ~ '>'`). So untrusted texts are plain
`str`, and the template's own are `TemplateText`: equal to the same characters in every way, with one byte beside each
that says whether the template wrote it. Operations that join, cut or change texts carry these bytes along. Others
return a plain str, which is untrusted: a bug here can turn a control token into text, never text into a control token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

_OWN, _OUTSIDE = b"\1", b"\0"
_MOST_STRETCHED = 2**16  # characters that are looked at one by one when a text grows as its case changes
MASK = (
    "\ud800"  # replaces untrusted characters in `masked` and `own_text`: no token contains a lone surrogate
)


class TemplateText(str):
    """A str with ``own``: for each character 1 where the template wrote it, 0 where it is untrusted.

    Text that is put in place of other text (`replace`) is the template's only where what it replaces was.
    """

    __slots__ = ("own",)
    own: bytes

    def __new__(cls, text: str, own: bytes | None = None) -> TemplateText:
        made = super().__new__(cls, text)
        made.own = _OWN * len(made) if own is None else own
        return made

    def __str__(self) -> str:
        return self

    def __iter__(self) -> Iterator[str]:
        for character, own in zip(super().__iter__(), self.own, strict=True):
            yield TemplateText(character) if own else character

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        own = self.own[key] if isinstance(key, slice) else bytes((self.own[key],))
        return with_ownership(str.__getitem__(self, key), own)

    def __add__(self, other: str) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> str:
        return with_ownership(str.__mul__(self, times), self.own * times)

    __rmul__ = __mul__

    # The methods are called for a plain str as well, with the template's text among their arguments.

    def join(self, values: Iterable[str], /) -> str:
        return joined(values, self)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        own, put = ownership(self), ownership(new)
        foreign = bytes(len(new))
        if not old:
            text = str.replace(self, old, new, count)
            return with_ownership(text, _OWN * len(text) if _all(own) and _all(put) else bytes(len(text)))
        pieces = str.split(self, old, count)
        masks, at = [own[: len(pieces[0])]], len(pieces[0])
        for piece in pieces[1:]:
            masks.append(put if _all(own[at : at + len(old)]) else foreign)
            at += len(old)
            masks.append(own[at : at + len(piece)])
            at += len(piece)
        return with_ownership(str.join(new, pieces), b"".join(masks))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        return _pieces(self, str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        return _pieces(self, str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:  # type: ignore[override]
        whole = _pieces(self, str.splitlines(self, True), "")
        if keepends:
            return whole
        return [line[: len(cut)] for line, cut in zip(whole, str.splitlines(self), strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = _pieces(self, str.partition(self, sep), "")
        return before, found, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = _pieces(self, str.rpartition(self, sep), "")
        return before, found, after

    def strip(self, chars: str | None = None, /) -> str:
        left, right = len(self) - len(str.lstrip(self, chars)), len(str.rstrip(self, chars))
        return with_ownership(str.strip(self, chars), ownership(self)[left:right])

    def lstrip(self, chars: str | None = None, /) -> str:
        text = str.lstrip(self, chars)
        return with_ownership(text, ownership(self)[len(self) - len(text) :])

    def rstrip(self, chars: str | None = None, /) -> str:
        text = str.rstrip(self, chars)
        return with_ownership(text, ownership(self)[: len(text)])

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def center(self, width: SupportsIndex, fillchar: str = " ", /) -> str:
        text = str.center(self, width, fillchar)
        more = len(text) - len(self)
        return _padded(self, text, more // 2 + (more & len(text) & 1))

    def ljust(self, width: SupportsIndex, fillchar: str = " ", /) -> str:
        return _padded(self, str.ljust(self, width, fillchar), 0)

    def rjust(self, width: SupportsIndex, fillchar: str = " ", /) -> str:
        text = str.rjust(self, width, fillchar)
        return _padded(self, text, len(text) - len(self))


class Escaped(TemplateText):
    """What the filters `e` and `safe` give: text that + adds other text to only when that is escaped as well."""

    __slots__ = ()


def ownership(text: str) -> bytes:
    """1 for each character that the template wrote, 0 for each other one."""
    return text.own if isinstance(text, TemplateText) else bytes(len(text))


def with_ownership(text: str, own: bytes) -> str:
    """The text with its ownership; plain where the template wrote none of its characters."""
    return TemplateText(text, own) if _OWN in own else plain(text)


def plain(text: str) -> str:
    """The same characters as untrusted text, whatever kind of str they came in."""
    return str.__str__(text)


def joined(texts: Iterable[Any], separator: str = "") -> str:
    """The texts joined by the separator, each with its ownership. TypeError for what is no str."""
    parts = list(texts)
    text = str.join(separator, parts)
    if not any(isinstance(part, TemplateText) for part in (separator, *parts)):
        return text
    return with_ownership(text, ownership(separator).join(map(ownership, parts)))


def own_runs(text: str) -> Iterator[tuple[int, int]]:
    """Where each stretch of the template's own characters begins and ends."""
    own, end = ownership(text), 0
    while (start := own.find(_OWN, end)) >= 0:
        end = own.find(_OUTSIDE, start)
        end = len(own) if end < 0 else end
        yield start, end


def masked(text: str) -> str:
    """The text, in its length, with a lone surrogate in place of every untrusted character."""
    view, end, bare = [], 0, plain(text)
    for start, stop in own_runs(text):
        view += [MASK * (start - end), bare[start:stop]]
        end = stop
    return "".join(view) + MASK * (len(bare) - end)


def own_text(text: str) -> str:
    """The template's own characters, with one lone surrogate in place of each stretch of untrusted ones."""
    parts, end, bare = [], 0, plain(text)
    for start, stop in own_runs(text):
        parts += [MASK * (start > end), bare[start:stop]]
        end = stop
    return "".join(parts) + MASK * (len(bare) > end)


def _all(own: bytes) -> bool:
    return _OUTSIDE not in own


def _pieces(text: str, pieces: Iterable[str], separator: str | None) -> list[str]:
    """The pieces that a text was cut into, in their order, each with its ownership. None: at white space."""
    own, found, at = ownership(text), [], 0
    for piece in pieces:
        if separator is None:
            at = str.find(text, piece, at)
        found.append(with_ownership(piece, own[at : at + len(piece)]))
        at += len(piece) + len(separator or "")
    return found


def _padded(text: str, padded: str, left: int) -> str:
    own = ownership(text)
    return with_ownership(padded, bytes(left) + own + bytes(len(padded) - left - len(own)))


def _in_case(name: str, by_character: bool) -> Callable[[str], str]:
    """A method that changes the case. ``by_character``: what a character becomes depends on no other one's."""
    change: Callable[[str], str] = getattr(str, name)

    def method(self: str) -> str:
        text, own = change(self), ownership(self)
        if len(text) == len(self):  # no character ever becomes none, so each became one
            return with_ownership(text, own)
        if not by_character or _OWN not in own or len(self) > _MOST_STRETCHED:
            return plain(text)
        lengths = [len(change(character)) for character in plain(self)]
        stretched = b"".join(own[i : i + 1] * length for i, length in enumerate(lengths))
        return with_ownership(text, stretched) if len(stretched) == len(text) else plain(text)

    method.__name__ = name
    return method


for _name in ("upper", "lower", "casefold", "swapcase"):
    setattr(TemplateText, _name, _in_case(_name, by_character=True))
for _name in ("title", "capitalize"):
    setattr(TemplateText, _name, _in_case(_name, by_character=False))
