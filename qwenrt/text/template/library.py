"""What a chat template may call: filters, tests, functions and attributes, each drawing on the rendering's budget.

They are those of jinja2 and transformers, with the results they have there, but for what makes no prompt: `random` and
`lipsum`, which give another one each time, and `urlize`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn, Protocol, cast
from urllib.parse import quote

from jinja2 import filters, pass_environment, tests
from jinja2.runtime import LoopContext, Undefined
from jinja2.utils import Cycler, Joiner, Namespace

from qwenrt.errors import RequestError
from qwenrt.text.template.budget import CONTAINER, ITEM, Budget, Cost, LimitError, current, metered
from qwenrt.text.template.provenance import Escaped, TemplateText, ownership
from qwenrt.text.template.strings import (
    BLANKS,
    METHODS,
    cost_of_case,
    cost_of_join,
    cost_of_replace,
    cost_of_trim,
    cost_of_width,
    format_percent,
    text,
)

_LOOP = ("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0")
ATTRIBUTES: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset((*METHODS, "format", "format_map"))),
    (dict, frozenset(("get", "items", "keys", "values", "copy"))),
    (list, frozenset(("index", "count", "copy"))),
    (tuple, frozenset(("index", "count", "grouper", "list"))),  # the last two: of groupby
    (int, frozenset(("bit_length", "real", "imag"))),
    (float, frozenset(("is_integer", "real", "imag"))),
    (LoopContext, frozenset((*_LOOP, "previtem", "nextitem", "cycle", "changed"))),
    (Cycler, frozenset(("next", "current", "reset"))),
)
_MAX_INDENT = 16
_MOST_KEY = 2**60


class _Sandbox(Protocol):
    """What filters need of it."""

    def getattr(self, obj: Any, attribute: str) -> Any: ...

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any: ...

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool: ...

    def undefined(self, *, obj: Any, name: str) -> Undefined: ...


# ---- functions


def raise_exception(message: Any) -> NoReturn:
    """The template's own refusal of a conversation."""
    raise RequestError("the chat template", text(message)[:500], "Send a conversation that it knows.")


def strftime_now(form: str) -> str:
    if not re.fullmatch(r"(?:[^%]|%[-#]?[a-zA-Z%]){0,100}", form):
        raise LimitError("rendering", f"strftime_now({form!r:.60})")
    return datetime.now().strftime(form)


def bounded_range(*args: int) -> list[int]:
    """The numbers as a list: no search in it is longer than it is."""
    numbers = range(*args)
    if not numbers:
        return []
    # len(range) itself overflows on what only a hostile template asks for
    current.get().reserve(ITEM * ((abs(numbers[-1] - numbers[0]) // abs(numbers.step)) + 1))
    return list(numbers)


def _dict(pairs: Any = (), **named: Any) -> dict[Any, Any]:
    """dict(...), but for keys that could all be made to fall into one place of its table."""
    found: dict[Any, Any] = {}
    for key, value in current.get().counted(pairs.items() if isinstance(pairs, Mapping) else pairs):
        if not isinstance(key, (str, type(None))) and not (
            isinstance(key, (int, float)) and abs(key) < _MOST_KEY
        ):
            raise LimitError("rendering", f"dict() with the key {key!r:.40}")
        found[key] = value
    return {**found, **named}


# ---- filters


def _string_filter(name: str, cost: Cost | None) -> Callable[..., str]:
    """The filter that is a method of str, for whatever is written out."""
    method = getattr(TemplateText, name)

    def apply(value: Any, *args: Any, **named: Any) -> str:
        value, budget = text(value), current.get()
        budget.read(value)
        if cost is not None:
            cost(budget, value, *args, **named)
        return str(method(value, *args, **named))

    return apply


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as the models were trained on it: nothing escaped for HTML, keys in their order."""
    budget = current.get()
    margin = indent if isinstance(indent, str) else " " * min(max(indent or 0, 0), _MAX_INDENT + 1)
    if len(margin) > _MAX_INDENT:
        raise LimitError("rendering", f"tojson(indent={indent!r:.40})")
    if separators is not None and sum(map(len, separators)) > _MAX_INDENT:
        raise LimitError("rendering", "tojson with long separators")
    budget.read(value, deep=True)
    # Per item 32 are counted already; an escape is of six characters, of twelve beyond the basic plane.
    per_item = len(margin) * budget.depth(value) // ITEM + 1
    budget.reserve(budget.size(value) * ((12 if ensure_ascii else 6) + per_item))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@pass_environment
def _join(environment: Any, values: Any, d: Any = "", attribute: Any = None) -> str:
    values = current.get().listed(values)
    if attribute is not None:
        values = [filters.make_attrgetter(environment, attribute)(value) for value in values]
    texts, d = [text(value) for value in values], text(d)
    cost_of_join(current.get(), d, texts)
    return TemplateText.join(cast(TemplateText, d), texts)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    value, old, new = text(value), text(old), text(new)
    cost_of_replace(current.get(), value, old, new)
    return TemplateText.replace(value, old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Every line but the first moved right; blank lines stay empty unless ``blank``."""
    if not isinstance(value, str):  # jinja2 adds a line break to it, which fails
        raise TypeError(f"indent of {type(value).__name__}")
    margin = " " * min(width, _MAX_INDENT + 1) if isinstance(width, int) else width
    if len(margin) > _MAX_INDENT:
        raise LimitError("rendering", f"indent by more than {_MAX_INDENT}")
    lines = METHODS["splitlines"](text(value) + "\n")
    moved = [margin + line if line or blank else line for line in lines[1:]]
    head = (margin if first else "") + (lines[0] if lines else "")
    return TemplateText.join(cast(TemplateText, "\n"), [head, *moved])


def _list(values: Any) -> list[Any]:
    return current.get().listed(values)


def _round(value: float, precision: int = 0, method: str = "common") -> Any:
    if not -20 <= precision <= 20:
        raise LimitError("rendering", f"round({precision!r:.40}, {method!r:.40})")
    return filters.do_round(value, precision, cast(Any, method))


def escaped(value: Any) -> Escaped:
    """The text with what HTML reads as markup escaped, once."""
    return value if isinstance(value, Escaped) else _forceescape(value)


def _forceescape(value: Any) -> Escaped:
    written = html.escape(text(value)).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
    return Escaped(written, bytes(len(written)))


def _safe(value: Any) -> Escaped:
    value = text(value)
    return Escaped(value, ownership(value))


def _striptags(value: Any) -> str:
    """Without tags and comments, as far as these are closed, and with single blanks."""
    value = text(value)
    kept, end = [], 0
    while (start := value.find("<", end)) >= 0:
        closing = "-->" if value.startswith("<!--", start) else ">"
        stop = value.find(closing, start + len(closing))
        if stop < 0:
            break
        kept.append(value[end:start])
        end = stop + len(closing)
        current.get().spend(ITEM)
    return html.unescape(" ".join(METHODS["split"]("".join([*kept, value[end:]]))))


def _urlencode(value: Any) -> str:
    """Quoted for a URL: a text, or the pairs of an object."""
    budget = current.get()
    budget.read(value, deep=True)
    budget.reserve(12 * budget.size(value))
    if isinstance(value, str) or not isinstance(value, (list, tuple, dict)):
        return quote(text(value), safe="/")
    pairs = value.items() if isinstance(value, dict) else value
    return "&".join(
        "=".join(quote(text(part), safe="").replace("%20", "+") for part in pair) for pair in pairs
    )


def _wordcount(value: Any) -> int:
    value = text(value)
    current.get().step(len(value) // 32)
    return sum(1 for _ in re.finditer(r"\w+", value))


@pass_environment
def _attr(environment: _Sandbox, value: Any, name: Any) -> Any:
    """An attribute, never an item."""
    name = str(name)
    found = getattr(value, name, None)
    if found is not None and environment.is_safe_attribute(value, name, found):
        return environment.getattr(value, name)
    return environment.undefined(obj=value, name=name)


@pass_environment
def _sum(environment: _Sandbox, values: Any, attribute: Any = None, start: Any = 0) -> Any:
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings [use join instead]")
    get = filters.make_attrgetter(cast(Any, environment), attribute) if attribute is not None else None
    for value in current.get().counted(values):
        start = environment.call_binop(None, "+", start, value if get is None else get(value))
    return start


@pass_environment
def _unique(environment: Any, values: Any, *args: Any, **named: Any) -> list[Any]:
    # Counted as they go in: equal values come out once, whatever it takes to find them equal.
    return list(filters.do_unique(environment, current.get().counted(values), *args, **named))


# ---- what some of jinja's own cost beyond their arguments


def _deep(budget: Budget, *args: Any, **named: Any) -> None:
    """Values are compared, each with a few others, down to their last parts."""
    for value in (*args, *named.values()):
        if isinstance(value, (list, tuple, dict)):
            budget.read(value, deep=True)
            budget.step(len(value) * len(value).bit_length() // 8)


def _cost_of_batch(budget: Budget, values: Any, linecount: Any, fill_with: Any = None) -> None:
    rows = len(values) // max(int(linecount), 1) + 1
    budget.spend(ITEM * (len(values) + max(int(linecount), 0)) + CONTAINER * rows)


def _cost_of_slice(budget: Budget, values: Any, slices: Any, fill_with: Any = None) -> None:
    budget.spend(ITEM * len(values) + (CONTAINER + ITEM) * max(int(slices), 0))


def _cost_of_title(budget: Budget, s: Any) -> None:
    """The text is taken apart at each blank, hyphen and opening bracket."""
    s = text(s)
    budget.step(len(s) // 64)
    budget.spend(3 * len(s) + 2 * ITEM * sum(map(s.count, BLANKS + "-([{<")))


def _cost_of_truncate(
    budget: Budget, s: Any, length: Any = 255, killwords: Any = False, end: Any = "...", *_: Any
) -> None:
    budget.reserve(len(s) + len(end))


def _cost_of_pprint(budget: Budget, value: Any) -> None:
    budget.step(budget.size(value) // 16)
    budget.reserve(budget.size(value) * (11 + budget.depth(value)))


def _cost_of_wrap(budget: Budget, s: str, *args: Any, **named: Any) -> None:
    """The expression that finds where to break looks through a word once for each of its characters."""
    longest = max(map(len, METHODS["split"](s)), default=0)
    budget.step(len(s) * longest // 1024 + len(s) // 16)
    ends = [len(value) for value in (*args, *named.values()) if isinstance(value, str)]
    budget.reserve(len(s) * (2 + max(ends, default=1)))


def _cost_of_attributes(budget: Budget, d: Any, *args: Any) -> None:
    budget.read(d, deep=True)
    budget.reserve(6 * budget.size(d))


def _cost_of_escape(budget: Budget, value: Any) -> None:
    budget.reserve(6 * budget.size(value))


_OWN: dict[str, tuple[Callable[..., Any], Cost | None]] = {
    "attr": (_attr, None),
    "e": (escaped, _cost_of_escape),
    "escape": (escaped, _cost_of_escape),
    "forceescape": (_forceescape, _cost_of_escape),
    "format": (lambda form, *values, **named: format_percent(text(form), named or values), None),
    "indent": (_indent, None),
    "join": (_join, None),
    "list": (_list, None),
    "replace": (_replace, None),
    "round": (_round, None),
    "safe": (_safe, None),
    "string": (text, None),
    "striptags": (_striptags, None),
    "sum": (_sum, None),
    "tojson": (to_json, None),
    "trim": (_string_filter("strip", cost_of_trim), None),
    "unique": (_unique, _deep),
    "urlencode": (_urlencode, None),
    "wordcount": (_wordcount, None),
    "upper": (_string_filter("upper", cost_of_case), None),
    "lower": (_string_filter("lower", cost_of_case), None),
    "capitalize": (_string_filter("capitalize", cost_of_case), None),
    "center": (_string_filter("center", cost_of_width), None),
}
_JINJA: dict[str, Cost | None] = {
    **dict.fromkeys(("abs", "count", "d", "default", "filesizeformat", "first", "float", "int", "items")),
    **dict.fromkeys(("last", "length", "map", "reject", "rejectattr", "reverse", "select", "selectattr")),
    "title": _cost_of_title,
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort"), _deep),
    "batch": _cost_of_batch,
    "pprint": _cost_of_pprint,
    "slice": _cost_of_slice,
    "truncate": _cost_of_truncate,
    "wordwrap": _cost_of_wrap,
    "xmlattr": _cost_of_attributes,
}


def _cost_of_test(budget: Budget, *args: Any, **named: Any) -> None:
    budget.step(16)
    _deep(budget, *args, **named)


FILTERS = {
    **{name: metered(filters.FILTERS[name], cost) for name, cost in _JINJA.items()},
    **{name: metered(function, cost) for name, (function, cost) in _OWN.items()},
}
TESTS = {name: metered(cast(Any, test), _cost_of_test) for name, test in tests.TESTS.items()}
FUNCTIONS: dict[str, Any] = {
    "cycler": Cycler,
    "dict": _dict,
    "joiner": Joiner,
    "namespace": Namespace,
    "raise_exception": raise_exception,
    "range": bounded_range,
    "strftime_now": strftime_now,
}
