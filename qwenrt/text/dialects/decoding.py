"""From the bytes of a body to a dialect's types, and from its words for sampling to those of SamplingParams."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any, TypeVar

import msgspec

from qwenrt.errors import RequestError, shown
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.chat.efforts import EFFORTS
from qwenrt.text.dialects.misspelt import look_for_misspelt
from qwenrt.text.dialects.problem import Problem

MAX_DEPTH = 200  # of arrays and objects; what walks over a request later may recurse
MAX_TOOLS = 1024
MAX_TOOL_NAME = 256

T = TypeVar("T")

_BOM = b"\xef\xbb\xbf"
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_AT_ONCE = 16384  # bytes that are looked at before another thread may have its turn
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_PLACE = re.compile(r"(key in )?\$\.?([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ASKED = "sampling parameter "  # what the errors of SamplingParams begin with


def decode(body: bytes, type: type[T]) -> T:
    """The JSON object in ``body`` as a msgspec Struct, or any other type that msgspec reads from an object.

    Fields that the type does not know are passed over (the log says which are nearly one that it does), those it knows
    must have its types; of a key that is there twice the last one counts. Raises Problem:
    "invalid_json" for what is no JSON object in UTF-8, "invalid_request" with the JSON path of the first value whose
    type is wrong.
    """
    body = body.removeprefix(_BOM)
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise _no_json(f"byte {error.start} is not UTF-8", "Send UTF-8.") from None
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _depth(body) > MAX_DEPTH:
        raise _no_json(f"it is nested more than {MAX_DEPTH} deep", "Send a flatter one.")
    try:
        value: T = _decoder(type).decode(body)
        look_for_misspelt(body, type)
        return value
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except msgspec.DecodeError as error:
        if _SURROGATE.search(body):
            raise _no_json(f"{error}, or it has half of a surrogate pair", "Send whole characters.") from None
        raise _no_json(str(error), "Send a JSON object.") from None
    except RecursionError:
        raise _no_json("it is nested too deep", "Send a flatter one.") from None


def _uncached(type: Any) -> Any:
    return msgspec.json.Decoder(type)


_decoder: Callable[[Any], Any] = lru_cache(maxsize=256)(_uncached)


def _depth(body: bytes) -> int:
    """How deep arrays and objects of JSON are in each other, not looking further where that is more than MAX_DEPTH; of
    what is no JSON, anything."""
    structure = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
    deepest = depth = inside = 0
    for start in range(0, len(structure), _AT_ONCE):
        pieces = structure[start : start + _AT_ONCE].split(b'"')
        depths = [*accumulate(map(_STEPS.__getitem__, b"".join(pieces[inside::2])), initial=depth)]
        deepest, depth = max(deepest, *depths), depths[-1]
        if deepest > MAX_DEPTH:
            break
        inside = (inside + len(pieces) - 1) % 2
    return deepest


def _no_json(found: str, remedy: str) -> Problem:
    return Problem("invalid_json", f"The body is not JSON that can be read: {found}. {remedy}")


def _wrong_type(said: str) -> Problem:
    found, _, where = said.rpartition(" - at `")  # a value may be part of what is said, however long
    match = _PLACE.fullmatch(where)
    key, place = (match[1], match[2]) if match else ("", "")
    found = (found if match else said)[:300]
    if missing := _MISSING.search(found):
        place = f"{place}.{missing[1]}" if place else missing[1]
        return bad(place, "it is missing", "Send it.")
    if not place:
        return _no_json(found, "Send a JSON object.")
    return bad(place, f"{'a key: ' if key else ''}{found}", "Send the right type, or leave it out.")


def bad(param: str, found: str, remedy: str) -> Problem:
    """The problem of a value at the JSON path ``param``: what was found there, what to do."""
    return Problem("invalid_request", f"{param}: {found}. {remedy}", param=param)


def said(value: T | msgspec.UnsetType | None) -> T | None:
    """A field's value where the request says one; None where it is null or absent."""
    return None if value is msgspec.UNSET else value


def at_most(param: str, values: Sized, most: int) -> None:
    """Raise Problem where a list or text is longer than ``most``."""
    if len(values) > most:
        raise bad(param, f"it has {len(values)} entries", f"At most {most} are taken.")


def between(param: str, value: float, low: float, high: float) -> None:
    """Raise Problem for a number outside [low, high]. What SamplingParams checks needs no check here."""
    if not low <= value <= high:
        raise bad(param, f"got {shown(value)}", f"It must be in [{low:g}, {high:g}].")


@contextmanager
def blamed_on(param: str) -> Iterator[None]:
    """Within the block a RequestError is a problem of the value at ``param``."""
    try:
        yield
    except RequestError as error:
        raise Problem("invalid_request", f"{param}: {error}", param=param) from error


def sampling_from(
    struct: Any, names: Mapping[str, str], *, at: str = "", also: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of SamplingParams that a request sets, checked: what SamplingParams refuses is a Problem whose param
    is the dialect's own name.

    names: attribute of ``struct`` -> field of SamplingParams, where the later of two with the same field wins. Absent
    and null fields are left out. at: the path of ``struct`` in the body, such as "options". also: fields of
    SamplingParams that the dialect worked out by itself, by their names.
    """
    sampling, paths = dict(also or {}), {}
    for attribute, field in names.items():
        value = said(getattr(struct, attribute))
        if value is not None:
            sampling[field] = value
            paths[field] = f"{at}.{attribute}" if at else attribute
    checked_sampling(sampling, paths)
    return sampling


def checked_sampling(sampling: Mapping[str, Any], paths: Mapping[str, str]) -> None:
    """Raise Problem for what SamplingParams refuses. paths: field of SamplingParams -> the JSON path it came from."""
    try:
        SamplingParams(**{"max_tokens": None, **sampling})
    except RequestError as error:
        field = error.asked.removeprefix(_ASKED)
        param = paths.get(field, field)
        raise bad(param, error.found, error.remedy) from error


def checked_effort(effort: str | None, param: str) -> str | None:
    """How much to think, in a word. Raises Problem for an unknown one, which stands at the JSON path ``param``."""
    if effort is not None and effort not in EFFORTS:
        raise bad(param, f"got {shown(effort)}", f"Known are: {', '.join(EFFORTS)}.")
    return effort


def tool_name(name: str, param: str) -> str:
    """A tool's name as it is. Raises Problem for one that is empty, very long, or has control characters."""
    if not 0 < len(name) <= MAX_TOOL_NAME or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name):
        wanted = f"A tool's name has 1 to {MAX_TOOL_NAME} characters and no control characters."
        raise bad(param, f"got {shown(name)}", wanted)
    return name


def checked_tools(
    tools: list[dict[str, Any]],
    param: str = "tools",
    *,
    name: str = ".function.name",
    parameters: str = ".function.parameters",
) -> list[dict[str, Any]]:
    """Tools of OpenAI's shape whose names are names, each there once, and whose parameters are a schema; as they are.

    Raises Problem with the path of the first that is not; ``name`` and ``parameters`` say where in a tool the dialect
    has them. Tools of Qwen-1's own shape have name_for_model, and may have a list of parameters.
    """
    at_most(param, tools, MAX_TOOLS)
    names: set[str] = set()
    for i, tool in enumerate(tools):
        place = f"{param}[{i}]"
        called, schema = name_of(tool), tool["function"].get("parameters")
        if not isinstance(called, str):
            raise bad(place + name, f"got {shown(called)}", "Send the tool's name.")
        tool_name(called, place + name)
        if called in names:
            raise bad(place + name, f"{shown(called)} is there twice", "Give each tool a name of its own.")
        names.add(called)
        if schema is not None and not isinstance(schema, (dict, list)):
            raise bad(place + parameters, f"got {shown(schema)}", "Send a JSON schema, which is an object.")
        if isinstance(schema, dict):
            _check_schema(schema, place + parameters)
    return tools


# What the keywords of a tool's schema must be, of those that prompts and readers of calls look at.
_KEYWORDS: dict[str, tuple[type, ...]] = {"type": (str, list), "properties": (dict,), "required": (list,)}


def _check_schema(schema: Mapping[str, Any], param: str) -> None:
    for keyword, kinds in _KEYWORDS.items():
        value = schema.get(keyword)
        if value is not None and not isinstance(value, kinds):
            raise bad(f"{param}.{keyword}", f"got {shown(value)}", "Send a JSON schema of an object.")


def name_of(tool: Mapping[str, Any]) -> Any:
    """The name of a tool of OpenAI's shape; it may be anything where the tool was not checked."""
    function = tool["function"]
    return function.get("name_for_model") or function.get("name")


def chosen_tool(name: str, tools: list[dict[str, Any]], param: str = "tool_choice") -> dict[str, str]:
    """Ask.tool_choice for one named tool. Raises Problem where it is not among the tools."""
    known = [name_of(tool) for tool in tools]
    if name not in known:
        raise bad(param, f"there is no tool {shown(name)}", f"Known are: {shown(known, 400)}.")
    return {"name": name}
