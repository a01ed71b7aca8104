"""Values written as plain text, typed by the JSON schema of the tool's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwenrt.text.replies.strict_json import read_json, write_json

_TYPES: dict[str, type | tuple[type, ...]] = {
    "null": type(None),
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
}
_ALIASES = {  # Python's words, which hand-written tools use
    "none": "null",
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "list": "array",
    "dict": "object",
    "str": "string",
}
_BEGINNINGS = {"{": ("object",), "[": ("array",), "-0123456789": ("integer", "number")}
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}


class ParameterSchema:
    """The schema of one tool's parameters."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._root = schema
        properties = schema.get("properties")
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._types: dict[str, frozenset[str]] = {}

    def value(self, key: str, text: str) -> Any:
        """The value that the text means; the text itself where a string is due or nothing else fits.

        A type other than string goes first: with ["string", "null"] the text "null" is None, with ["string",
        "integer"] the text "5" is 5. True, False and None are read like JSON's words.
        """
        types = self._other_types(key)
        if not types:
            return text
        written = text.strip()
        written = _WORDS.get(written.lower(), written)
        try:
            value, end = read_json(written)
            write_json(value)
        except ValueError:
            return text
        if written[end:] or not any(_is(value, kind) for kind in types):
            return text
        return int(value) if isinstance(value, float) and "number" not in types else value

    def only_text(self, key: str) -> bool:
        """Whether the value is the text itself, whatever it is."""
        return not self._other_types(key)

    def may_be_text(self, key: str) -> bool:
        """Whether a text is among the values that the schema allows."""
        types = self._all_types(key)
        return not types or "string" in types

    def may_be_other(self, key: str, begun: str) -> bool:
        """Whether a text that begins like this may have another value than the text itself. ``begun``: its beginning
        without white space in front, at least one character."""
        types = self._other_types(key)
        for characters, kinds in _BEGINNINGS.items():
            if begun[0] in characters:
                return not types.isdisjoint(kinds)
        word = begun.lower().rstrip()
        return not types.isdisjoint(("boolean", "null")) and any(known.startswith(word) for known in _WORDS)

    def _other_types(self, key: str) -> frozenset[str]:
        """All types but string that the value may have."""
        return self._all_types(key) - {"string"}

    def _all_types(self, key: str) -> frozenset[str]:
        if key not in self._types:
            self._types[key] = self._types_of(self._properties.get(key))
        return self._types[key]

    def _types_of(self, schema: object) -> frozenset[str]:
        """All types that the schema allows; empty where it says nothing."""
        types: set[str] = set()
        references: set[str] = set()  # each is followed once: a schema may refer to itself
        parts = [schema]
        while parts:
            part = parts.pop()
            if not isinstance(part, Mapping):
                continue
            types |= _own_types(part)
            reference = part.get("$ref")
            if isinstance(reference, str) and reference not in references:
                references.add(reference)
                parts.append(self._referred(reference))
            for word in ("anyOf", "oneOf", "allOf"):
                if isinstance(part.get(word), list | tuple):
                    parts.extend(part[word])
        return frozenset(types)

    def _referred(self, reference: str) -> object:
        """What "#/$defs/Name" stands for in this schema; None for any other reference."""
        found: object = self._root
        for step in reference.removeprefix("#/").split("/"):
            found = found.get(step) if isinstance(found, Mapping) else None
        return found


def parameter_schemas(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, ParameterSchema]:
    """Schemas by the tool's name, from OpenAI's shape or bare functions. Other shapes type nothing."""
    schemas = {}
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            schemas[function["name"]] = ParameterSchema(parameters if isinstance(parameters, Mapping) else {})
    return schemas


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    """The types that this schema names itself, or shows by what it describes."""
    given = schema.get("type")
    names = [given] if isinstance(given, str) else given if isinstance(given, list | tuple) else []
    types = {_ALIASES.get(name.lower(), name.lower()) for name in names if isinstance(name, str)}
    if not types:
        values = schema["enum"] if isinstance(schema.get("enum"), list | tuple) else []
        values = [*values, schema["const"]] if "const" in schema else values
        types = {kind for value in values for kind in (*_TYPES, "string") if _is(value, kind)}
        types |= {kind for word, kind in (("properties", "object"), ("items", "array")) if word in schema}
    return types | {"null"} if schema.get("nullable") is True else types


def _is(value: object, kind: str) -> bool:
    if kind == "string":
        return isinstance(value, str)
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, ()))
