"""What is refused of a grammar before it is compiled, as compiling it could take seconds; and where in a schema."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from qwenrt.errors import RequestError, shown
from qwenrt.structure import Grammar

MAX_DEPTH = 64  # of a schema's JSON
MAX_PROPERTIES = 1000  # of one object: compiling is quadratic in them
# Optional ones of these, and of alternatives: each takes 4 of the 2000 items that a parser's row may have.
MAX_OPTIONAL = 400
# Of *, +, ? and {m,n} in all regular expressions of a grammar: compiling is quadratic in them.
MAX_REPETITIONS = 500
MAX_MULTIPLE = 10_000  # digits of a multipleOf, as one number: an automaton has as many states
MAX_MULTIPLES = 20_000  # of several that may apply to one number, multiplied

# What llguidance knows; JSON Schema lets all others pass.
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
# Keywords whose values are data, or schemas by names that are no keywords.
_DATA = ("const", "enum", "default", "example", "examples")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_BRANCHES = ("anyOf", "oneOf", "allOf")
_REPETITION = re.compile(r"\\.|[*+?]|\{\d+(?:,\d*)?\}", re.DOTALL)


def checked_schema(grammar: Grammar) -> dict[str, Any]:
    """The schema of a grammar of kind json_schema, as it is compiled: keywords that change nothing left out. Raises
    RequestError for what is no schema, allows nothing, or is too much."""
    try:
        schema = json.loads(grammar.text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError("a JSON schema", f"it is no JSON: {str(error)[:120]}", "Send JSON.") from error
    if schema is True:
        return {}
    if schema is False:
        raise RequestError("a JSON schema", "it is false", "It allows no answer at all: say what is allowed.")
    if not isinstance(schema, dict):
        raise RequestError("a JSON schema", f"it is {shown(schema)}", "Send an object.")
    _check_schema("a JSON schema", schema)
    cleaned = _cleaned(schema)
    assert isinstance(cleaned, dict)
    return cleaned


def check_regex(pattern: str) -> None:
    """Raises RequestError for one that would take too long."""
    _check_repetitions("a regular expression", [pattern])


def checked_lark(text: str) -> list[str | dict[str, Any]]:
    """A Lark grammar in pieces: text, and the schemas of its %json, as they are compiled. Raises RequestError.

    "%json" counts wherever it stands, also in a text, where it can be spelled "\\u0025json"."""
    what = "a Lark grammar"
    if "%llguidance" in text:
        raise RequestError(what, "it has settings of llguidance", "Leave %llguidance out.")
    pieces: list[str | dict[str, Any]] = []
    at = 0
    while (found := text.find("%json", at)) >= 0:
        start = found + len("%json")
        start += len(text[start:]) - len(text[start:].lstrip())
        try:
            schema, end = json.JSONDecoder(parse_constant=_no_number).raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                what, f"after %json: {str(error)[:120]}", "Put a JSON schema there."
            ) from error
        if not isinstance(schema, dict):
            raise RequestError(what, f"%json {shown(schema)}", "Put an object there.")
        _check_schema(f"{what}, %json", schema)
        pieces += [text[at:found], _cleaned(schema)]
        at = end
    pieces.append(text[at:])
    _check_repetitions(what, [piece for piece in pieces if isinstance(piece, str)])
    return pieces


def place_of(schema: Any, words: str) -> str:
    """Where the keyword or value stands that a compiler's message is about, as "$.properties.a"; "$" where that cannot
    be told."""
    named = {a or b for a, b in re.findall(r"\"([^\"]+)\"|'([^']+)'", words)}
    named |= {words.split()[-1], *(["oneOf"] if "oneOf" in words else [])}
    lines = {line.strip() for line in words.splitlines()}
    for place, key, value, _ in _walk(schema):
        if key in named or (isinstance(value, str) and (value in named or value.strip() in lines)):
            return place
    return "$"


def _check_schema(what: str, schema: dict[str, Any]) -> None:
    depth = _depth(schema)
    if depth > MAX_DEPTH:
        raise RequestError(
            what, f"it is nested {depth} levels deep", f"At most {MAX_DEPTH} are taken: use $defs."
        )
    for place, key, value, holder in _walk(schema):
        if key == "properties" and isinstance(value, dict) and len(value) > MAX_PROPERTIES:
            raise RequestError(
                f"{what}, {place}", f"{len(value)} of them", f"At most {MAX_PROPERTIES} are taken."
            )
        optional = _optional(value) if key in _BRANCHES else _optional([holder]) if key == "properties" else 0
        if optional > MAX_OPTIONAL:
            raise RequestError(
                f"{what}, {place}",
                f"{optional} of them are optional",
                f"At most {MAX_OPTIONAL} are taken: list in required what is always there.",
            )
        if key == "minProperties" and _may_repeat(value, holder):
            raise RequestError(
                f"{what}, {place}",
                f"{shown(value)}, but a key that is written twice counts once",
                "List the keys, with additionalProperties: false, or require them.",
            )
    _check_multiples(what, schema)
    _check_repetitions(what, list(_patterns(schema)))


def _optional(parts: object) -> int:
    """How many optional properties objects have that may begin at the same place."""
    count = 0
    for part in parts if isinstance(parts, list) else ():
        properties = part.get("properties") if isinstance(part, Mapping) else None
        if isinstance(properties, Mapping):
            required = part.get("required")
            listed = (
                {key for key in required if isinstance(key, str)} if isinstance(required, list) else set()
            )
            count += len(properties.keys() - listed)
    return count


def _walk(schema: Any, place: str = "$") -> Iterator[tuple[str, str, Any, Mapping[str, Any]]]:
    """(place, key, value, the object that has them) of everything in it."""
    parts = deque([(place, schema)])
    while parts:
        where, part = parts.popleft()
        if isinstance(part, Mapping):
            for key, value in part.items():
                yield f"{where}.{key}", key, value, part
                parts.append((f"{where}.{key}", value))
        elif isinstance(part, list):
            parts += [(f"{where}[{i}]", value) for i, value in enumerate(part)]


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner: list[Any] = []
        for part in level:
            inner += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        level = [part for part in inner if isinstance(part, (dict, list))]
    return depth


def _may_repeat(least: object, holder: Mapping[str, Any]) -> bool:
    """Whether an object could have ``least`` keys only by repeating one: those that are not listed are free."""
    if not isinstance(least, int):
        return False
    required = holder.get("required")
    listed = holder.get("additionalProperties") is False and not holder.get("patternProperties")
    return least > max(1, len(required) if isinstance(required, list) else 0) and not listed


def _check_multiples(what: str, schema: dict[str, Any]) -> None:
    whole, seen = 1, set()
    for place, key, value, _ in _walk(schema):
        if key != "multipleOf" or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        digits = int("".join(map(str, Decimal(repr(value)).normalize().as_tuple().digits)))
        if digits > MAX_MULTIPLE:
            raise RequestError(f"{what}, {place}", f"{value!r}", f"At most {MAX_MULTIPLE} is taken.")
        whole *= 1 if digits in seen else max(digits, 1)
        seen.add(digits)
    if whole > MAX_MULTIPLES and ("allOf" in str(schema) or "$ref" in str(schema)):
        raise RequestError(
            what, f"{len(seen)} values of multipleOf, which may meet in one number", "Use fewer."
        )


def _check_repetitions(what: str, patterns: list[str]) -> None:
    count = sum(not found.startswith("\\") for p in patterns for found in _REPETITION.findall(p))
    if count > MAX_REPETITIONS:
        raise RequestError(
            what, f"it has {count} repetitions (*, +, ?, {{m,n}})", f"At most {MAX_REPETITIONS} are taken."
        )


def _patterns(schema: dict[str, Any]) -> Iterator[str]:
    for _, key, value, _ in _walk(schema):
        if key == "pattern" and isinstance(value, str):
            yield value
        elif key == "patternProperties" and isinstance(value, Mapping):
            yield from value


def _cleaned(schema: Any) -> Any:
    """The schema without formats that mean nothing, uniqueItems that asks for nothing, and settings of a compiler."""
    if isinstance(schema, list):
        return [_cleaned(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "x-guidance" or (key == "uniqueItems" and value is False):
            continue
        if key == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if key in _NAMED and isinstance(value, dict):
            out[key] = {name: _cleaned(part) for name, part in value.items()}
        else:
            out[key] = value if key in _DATA else _cleaned(value)
    return out


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
