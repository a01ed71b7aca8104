"""What a chat template may call: filters, tests, functions and methods, each drawing on the rendering's budget."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn, cast

from jinja2 import filters, tests
from jinja2.runtime import LoopContext, Undefined
from jinja2.utils import Namespace

from qwenrt.errors import RequestError
from qwenrt.text.template_budget import ITEM, LimitError, current

_STR_METHODS = (
    *("startswith", "endswith", "strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "partition"),
    *("rpartition", "replace", "join", "upper", "lower", "title", "capitalize", "casefold", "swapcase"),
    *("find", "rfind", "index", "rindex", "count", "removeprefix", "removesuffix", "isalpha", "isalnum"),
    *("isdigit", "isdecimal", "isnumeric", "isspace", "isupper", "islower", "istitle"),
)
_LOOP = ("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0")
ATTRIBUTES: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset(_STR_METHODS)),
    (dict, frozenset(("get", "items", "keys", "values"))),
    (list, frozenset(("index", "count"))),
    (tuple, frozenset(("index", "count"))),
    (LoopContext, frozenset((*_LOOP, "previtem", "nextitem", "cycle", "changed"))),
)
_LONG_NEEDLE = 64  # above it, a search may be quadratic
_MAX_INDENT = 16


def text(value: Any) -> str:
    """A value as the text that a template writes for it. Objects of the renderer itself are never shown."""
    budget = current.get()
    if isinstance(value, str):
        budget.step()
        return value
    if isinstance(value, (list, tuple, dict)):
        budget.reserve(10 * budget.size(value))  # repr escapes a character by up to ten
    else:
        budget.size(value)
    return str(value)


def concat(*values: Any) -> str:
    """The operator ~"""
    texts = [text(value) for value in values]
    current.get().reserve(sum(map(len, texts)))
    return str(current.get().made("".join(texts)))


def percent(form: str, values: Any) -> str:
    """The operator % of a str, without widths that make much out of nothing."""
    budget = current.get()
    if re.search(r"%[^a-zA-Z%]*(\*|[0-9]{3})", form):
        raise LimitError("rendering", "a format with a width above 99")
    budget.reserve(len(form) + form.count("%") * (100 + 10 * budget.size(values)))
    return str(budget.made(form % values))


def check_method(method: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Refuse a call of a str's method whose result or work would be out of proportion."""
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(owner, str):
        return
    budget = current.get()
    budget.step(1 + len(owner) // 4096)
    needle = args[0] if args and isinstance(args[0], str) else ""
    if len(needle) > _LONG_NEEDLE and name not in ("join", "startswith", "endswith"):
        budget.step(min(len(needle) * len(owner) // 2**16, 2**40))
    if name == "replace" and len(args) > 1:
        check_replace(owner, args[0], args[1])
    elif name == "join" and args:
        budget.reserve(len(owner) * len(args[0]) + budget.size(args[0]))
    elif name in ("split", "rsplit", "splitlines"):
        separator = named.get("sep", needle)
        pieces = owner.count(separator) + 1 if isinstance(separator, str) and separator else len(owner)
        limit = named.get("maxsplit", args[1] if len(args) > 1 else -1)
        budget.reserve(ITEM * (min(pieces, limit + 1) if isinstance(limit, int) and limit >= 0 else pieces))


def check_replace(value: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        current.get().reserve(len(value) + (value.count(old) if old else len(value) + 1) * len(new))


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


# ---- filters


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as the models were trained on it: nothing escaped for HTML, keys in their order."""
    budget = current.get()
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= _MAX_INDENT):
        raise LimitError("rendering", f"tojson(indent={indent!r:.40})")
    if separators is not None and sum(map(len, separators)) > _MAX_INDENT:
        raise LimitError("rendering", "tojson with long separators")
    # Per item 16 are counted already; an escape is of six characters, of twelve beyond the basic plane.
    per_item = (indent or 0) * budget.depth(value) // ITEM + 1
    budget.reserve(budget.size(value) * ((12 if ensure_ascii else 6) + per_item))
    written = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return written
    return re.sub("[^\0-\x7f]", lambda c: c[0] if c[0] == budget.mark else json.dumps(c[0])[1:-1], written)


def _join(values: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        raise LimitError("rendering", "join(attribute=...)", "Use map(attribute=...) | join.")
    texts = [text(value) for value in values]
    current.get().reserve(sum(map(len, texts)) + len(texts) * len(d))
    return d.join(texts)


def _replace(value: Any, old: str, new: str, count: int = -1) -> str:
    value = text(value)
    check_method(value.replace, (old, new), {})
    return str(value.replace(old, new, -1 if count is None else count))


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Every line but the first moved right; blank lines stay empty unless ``blank``."""
    margin = " " * min(width, _MAX_INDENT + 1) if isinstance(width, int) else width
    if len(margin) > _MAX_INDENT:
        raise LimitError("rendering", f"indent by more than {_MAX_INDENT}")
    value = text(value)
    current.get().reserve(len(value) + ITEM * len(value.splitlines(True)))
    lines = value.splitlines()
    moved = [margin + line if line or blank else line for line in lines[1:]]
    head = (margin if first else "") + (lines[0] if lines else "")
    return "\n".join([head, *moved])


def _list(values: Any) -> list[Any]:
    if isinstance(values, str):
        current.get().reserve(ITEM * len(values))
    return current.get().listed(values)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if method != "common" or not -20 <= precision <= 20:
        raise LimitError("rendering", f"round({precision!r:.40}, {method!r:.40})")
    return round(value, precision)


_OWN: dict[str, Callable[..., Any]] = {
    "format": lambda form, *values, **named: percent(text(form), named or values),
    "indent": _indent,
    "join": _join,
    "list": _list,
    "replace": _replace,
    "round": _round,
    "safe": text,  # nothing is escaped here, so nothing needs to be exempt
    "string": text,
    "tojson": to_json,
}
_JINJA = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last"),
    *("length", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr"),
    *("sort", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)
_TESTS = (
    *("boolean", "callable", "defined", "divisibleby", "eq", "equalto", "even", "false", "float", "ge"),
    *("greaterthan", "gt", "in", "integer", "iterable", "le", "lessthan", "lower", "lt", "mapping", "ne"),
    *("none", "number", "odd", "sameas", "sequence", "string", "true", "undefined", "upper"),
    *("==", "!=", ">", ">=", "<", "<="),
)


def _metered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, its arguments and its result accounted for. What it would yield later it yields at once."""

    @wraps(function)
    def metered(*args: Any, **named: Any) -> Any:
        budget = current.get()
        budget.step(2 + sum(len(arg) for arg in args if isinstance(arg, (str, list, tuple, dict))) // 64)
        result = function(*args, **named)
        if isinstance(result, Iterator):
            result = budget.listed(result)
        return budget.made(result)

    return metered


def _ticked(test: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(test)
    def ticked(*args: Any, **named: Any) -> Any:
        current.get().step(16)
        return test(*args, **named)

    return ticked


FILTERS = {
    **{name: _metered(filters.FILTERS[name]) for name in _JINJA},
    **{name: _metered(function) for name, function in _OWN.items()},
}
TESTS: dict[str, Callable[..., Any]] = {name: _ticked(cast(Any, tests.TESTS[name])) for name in _TESTS}
FUNCTIONS: dict[str, Any] = {
    "dict": dict,
    "namespace": Namespace,
    "raise_exception": raise_exception,
    "range": bounded_range,
    "strftime_now": strftime_now,
}
SHOWN = (str, bool, int, float, list, tuple, dict, Undefined, type(None))
