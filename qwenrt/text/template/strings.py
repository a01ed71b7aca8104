"""What a chat template does with text: writing values, operators, methods of str, each with its cost."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from qwenrt.text.template.budget import ITEM, Budget, Cost, LimitError, current, metered
from qwenrt.text.template.provenance import TemplateText, joined, ownership

BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace())  # all that there are
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_CONVERSION = re.compile(
    r"%(?:\((?P<key>[^()]*)\))?(?P<flags>[-#0 +]*)(?P<width>\*|[0-9]*)"
    r"(?:\.(?P<precision>\*|[0-9]*))?[hlL]?(?P<kind>[diouxXeEfFgGcrsa%])"
)
_WRITERS: dict[str, Callable[[Any], str]] = {"r": repr, "a": ascii, "s": str}
_NUMBER = 400  # characters that a number takes without a width: 1e308 as %f
_MAX_NESTED = 3


class Lookup(Protocol):
    """The sandbox's ways to a part of a value."""

    def getattr(self, obj: Any, attribute: str) -> Any: ...

    def getitem(self, obj: Any, argument: Any) -> Any: ...


# ---- writing values


def text(value: Any) -> str:
    """A value as the text that a template writes for it. Objects of the renderer itself are never shown.

    What is written for a value other than a text is not the template's own: it did not choose those characters.
    """
    budget = current.get()
    if isinstance(value, str):
        budget.step()
        return value
    return _written(str, value, budget)


def _written(write: Callable[[Any], str], value: Any, budget: Budget) -> str:
    size = budget.size(value)
    budget.read(value, deep=True)
    budget.reserve(10 * size)  # an escape is of up to ten characters
    return write(value)


def concat(*values: Any) -> str:
    """The operator ~, and what joins the pieces of an output."""
    budget = current.get()
    texts = [text(value) for value in values]
    budget.reserve(sum(map(len, texts)))
    return str(budget.made(joined(texts)))


# ---- formats


def format_percent(form: str, values: Any) -> str:
    """The operator % of a str and the filter `format`, piece by piece: no width makes much out of nothing."""
    budget = current.get()
    arguments = _Arguments(values)
    pieces: list[str] = []
    end = 0
    while (start := form.find("%", end)) >= 0:
        conversion = _CONVERSION.match(form, start)
        if conversion is None:
            raise ValueError(f"unsupported or incomplete format {form[start : start + 20]!r}")
        pieces.append(budget.made(form[end:start]))
        end = conversion.end()
        if conversion["kind"] == "%":
            pieces.append(form[end - 1 : end])
        else:
            pieces.append(budget.made(_converted(conversion, arguments, budget)))
    arguments.check_all_taken()
    return str(budget.made(joined([*pieces, form[end:]])))


class _Arguments:
    """What a format with % takes, in its order or by key, as str's own % does."""

    def __init__(self, values: Any) -> None:
        self._values = values
        self._in_order: Sequence[Any] = values if isinstance(values, tuple) else (values,)
        self._taken = 0

    def next(self) -> Any:
        if self._taken >= len(self._in_order):
            raise TypeError("not enough arguments for format string")
        self._taken += 1
        return self._in_order[self._taken - 1]

    def by_key(self, key: str) -> Any:
        if not isinstance(self._values, dict):
            raise TypeError("format requires a mapping")
        self._taken = len(self._in_order)
        return self._values[key]

    def check_all_taken(self) -> None:
        if self._taken < len(self._in_order) and not isinstance(self._values, (dict, list)):
            raise TypeError("not all arguments converted during string formatting")


def _converted(conversion: re.Match[str], arguments: _Arguments, budget: Budget) -> str:
    flags, kind = conversion["flags"], conversion["kind"]
    width, precision = (
        _count(arguments.next() if given == "*" else given)
        for given in (conversion["width"] or None, conversion["precision"])
    )
    if width is not None and width < 0:
        flags, width = flags + "-", -width
    budget.reserve((width or 0) + (precision or 0) + _NUMBER)
    value = arguments.next() if conversion["key"] is None else arguments.by_key(conversion["key"])
    if kind in "sra":
        written = text(value) if kind == "s" else _written(_WRITERS[kind], value, budget)
        written = written if precision is None else written[: max(precision, 0)]
        return str(METHODS["ljust" if "-" in flags else "rjust"](written, width or 0))
    budget.reserve(_NUMBER + budget.size(value))
    form = f"%{flags}{'' if width is None else width}"
    return str(form + ("" if precision is None else f".{precision}") + kind) % (value,)


def _count(given: Any) -> int | None:
    """A width or a precision; None where there is none. A point with nothing behind it is a precision of 0."""
    if given is None:
        return None
    if isinstance(given, str) and len(given) <= 9:
        return int(given or "0")
    if isinstance(given, int) and abs(given) < 10**9:
        return int(given)
    raise LimitError("rendering", f"a width or precision of {given!r:.20}")


def format_braces(
    form: str, args: Sequence[Any], named: Mapping[str, Any], lookup: Lookup, level: int = 0
) -> str:
    """str.format, piece by piece, its fields looked up as everywhere in the sandbox."""
    budget = current.get()
    if level > _MAX_NESTED:
        raise ValueError("Max string recursion exceeded")
    own = 0 not in ownership(form)
    pieces: list[str] = []
    numbered = 0
    for literal, field, spec, conversion in string.Formatter().parse(form):
        if literal:
            pieces.append(budget.made(TemplateText(literal) if own else literal))
        if field is None:
            continue
        if re.match(r"(?:$|[.\[])", field):
            field, numbered = f"{numbered}{field}", numbered + 1
        value = _field(field, args, named, lookup)
        if conversion is not None:
            value = _written(_WRITERS[conversion], value, budget)
        spec = format_braces(spec or "", args, named, lookup, level + 1)
        if spec:
            digits = re.findall("[0-9]+", spec)
            budget.reserve(_NUMBER + budget.size(value) + sum(_count(number) or 0 for number in digits))
        pieces.append(budget.made(format(value, spec) if spec else text(value)))
    return str(budget.made(joined(pieces)))


def _field(field: str, args: Sequence[Any], named: Mapping[str, Any], lookup: Lookup) -> Any:
    first = re.match(r"[^.\[]*", field)
    name = first[0] if first else ""
    value = args[int(name)] if name.isdecimal() else named[name]
    rest, at = field[len(name) :], 0
    while at < len(rest):
        part = re.compile(r"\.([^.\[]+)|\[([^\]]+)\]").match(rest, at)
        if part is None:
            raise ValueError(f"the field {field!r:.60} of a format")
        if part[1] is not None:
            value = lookup.getattr(value, part[1])
        else:
            value = lookup.getitem(value, int(part[2]) if part[2].isdecimal() else part[2])
        at = part.end()
    return value


# ---- the methods of str


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


def _whole(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def cost_of_trim(budget: Budget, owner: str, chars: Any = None, /) -> None:
    """Each character of the text may be compared with each of those to be cut off."""
    budget.step(len(owner) * _length(chars) // 2**14)


def cost_of_replace(budget: Budget, owner: str, old: Any, new: Any, count: Any = -1) -> None:
    if isinstance(old, str) and isinstance(new, str):
        found = owner.count(old) if old else len(owner) + 1
        budget.spend(len(owner) + found * (len(new) + ITEM))  # and the pieces


def cost_of_join(budget: Budget, owner: str, values: Any, /) -> None:
    budget.read(values, deep=True)
    budget.reserve(len(owner) * _length(values) + budget.size(values))


def cost_of_case(budget: Budget, owner: str, /) -> None:
    budget.reserve(3 * len(owner))


def cost_of_width(budget: Budget, owner: str, width: Any = 80, *fill: Any) -> None:
    budget.reserve(len(owner) + _whole(width))


def _cost_of_split(budget: Budget, owner: str, sep: Any = None, maxsplit: Any = -1) -> None:
    if isinstance(sep, str) and sep:
        gaps = owner.count(sep)
    else:
        budget.step(len(owner) // 64)
        gaps = sum(map(owner.count, BLANKS))
    budget.spend(len(owner) + ITEM * (1 + (min(gaps, maxsplit) if _whole(maxsplit) else gaps)))


def _cost_of_rsplit(budget: Budget, owner: str, sep: Any = None, maxsplit: Any = -1) -> None:
    _cost_of_search_from_behind(budget, owner, sep)
    _cost_of_split(budget, owner, sep, maxsplit)


def _cost_of_lines(budget: Budget, owner: str, keepends: Any = False) -> None:
    budget.step(len(owner) // 64)
    budget.spend(len(owner) + ITEM * (1 + sum(map(owner.count, _LINE_ENDS))))


def _cost_of_search_from_behind(budget: Budget, owner: str, needle: Any, *bounds: Any) -> None:
    """Unlike a search from the front, it may compare every character with every one."""
    budget.step(len(owner) * _length(needle) // 2**14)


def _cost_of_rpartition(budget: Budget, owner: str, sep: Any, /) -> None:
    _cost_of_search_from_behind(budget, owner, sep)
    budget.spend(len(owner))


def _cost_of_partition(budget: Budget, owner: str, sep: Any, /) -> None:
    budget.spend(len(owner))


def _cost_of_tabs(budget: Budget, owner: str, tabsize: Any = 8) -> None:
    budget.reserve(len(owner) + owner.count("\t") * _whole(tabsize))


_COSTS: dict[str, Cost | None] = {
    **dict.fromkeys(("strip", "lstrip", "rstrip"), cost_of_trim),
    **dict.fromkeys(
        ("upper", "lower", "title", "capitalize", "casefold", "swapcase"),
        cost_of_case,
    ),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), cost_of_width),
    **dict.fromkeys(("rfind", "rindex"), _cost_of_search_from_behind),
    "split": _cost_of_split,
    "rsplit": _cost_of_rsplit,
    "splitlines": _cost_of_lines,
    "partition": _cost_of_partition,
    "rpartition": _cost_of_rpartition,
    "replace": cost_of_replace,
    "join": cost_of_join,
    "expandtabs": _cost_of_tabs,
    **dict.fromkeys(("find", "index", "count", "startswith", "endswith", "removeprefix", "removesuffix")),
    **dict.fromkeys(("isalpha", "isalnum", "isascii", "isdigit", "isdecimal", "isidentifier", "islower")),
    **dict.fromkeys(("isnumeric", "isprintable", "isspace", "istitle", "isupper")),
}
METHODS = {name: metered(getattr(TemplateText, name), cost) for name, cost in _COSTS.items()}
