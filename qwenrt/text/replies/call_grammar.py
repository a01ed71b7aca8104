"""The grammar of an answer that must call a tool, in each form that a model writes calls."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenrt.errors import RequestError, shown
from qwenrt.structure import Begins, Grammar, lark_literal
from qwenrt.text.replies.call_bodies import CALL, END_CALL, END_FUNCTION, END_PARAMETER, FUNCTION, PARAMETER
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.replies.schema_values import ParameterSchema

_MAX_LENGTH = 2000  # characters; longer bounds of texts would make large automata
# Keywords that say nothing about which arguments are right, and those that no grammar here can keep to.
_WORDS = (
    "title",
    "description",
    "default",
    "examples",
    "example",
    "$comment",
    "deprecated",
    "readOnly",
    "writeOnly",
)
_UNKEPT = (
    *("not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
    *("minProperties", "maxProperties"),
)
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_DATA = ("const", "enum")
# A text parameter with the tag that ends it; nothing in it that a reader would take for the end.
_VALUE = (
    r"/\n(?s:%s)\n<\/parameter>\n/"
    r" & ~/(?s:.*)(<\/parameter>|\n<parameter=|\n<\/function>)(?s:.*)\n<\/parameter>\n/"
)
# A thought and the action it leads to. One line, as Qwen-1 was trained to think: who is about to answer instead has no
# other way on than to act.
_THOUGHT = r"/%s[^\n]{0,400}\nAction: /"
# Arguments of a tool that is not strict, in the forms that are no JSON: whatever a reader takes for them.
_ANY_FUNCTION = r"/(?s:.*)<\/function>/ & ~/(?s:.*)<\/function>(?s:.+)/"
_ANY_INPUT = "/(?s:.*)/"
_ACTION, _FINAL_ANSWER = "\nAction:", "\nFinal Answer:"
_LINE_END, _END_VALUE = lark_literal("\n"), lark_literal(f"\n{END_PARAMETER}\n")


@dataclass(frozen=True)
class _Tool:
    """``schema``: of its arguments; None: they may be anything."""

    name: str
    schema: dict[str, Any] | None


def call_grammar(
    reply_format: ReplyFormat,
    tools: Sequence[Mapping[str, Any]],
    name: str | None = None,
    *,
    single: bool = False,
    in_thought: bool = False,
    tags: Collection[str] = (),
) -> Grammar:
    """The grammar of answers that are one call of ``tools`` or several, or of the one of this ``name``; one alone if
    ``single`` and in the ReAct form, where a thought stands before it.

    ``in_thought``: the prompt ended with ReAct's "Thought:". ``tags``: those of calls that are tokens of the
    vocabulary. Arguments are of their schema; what no grammar can keep to is left out of it, unless the tool is
    "strict". Raises RequestError for a tool that cannot be called in this form.
    """
    functions = [tool.get("function", tool) for tool in tools]
    chosen = [_tool(function) for function in functions if name is None or _name(function) == name]
    if reply_format.calls == "react":
        return Grammar.lark(_react(chosen, in_thought))
    opening, closing = (tag if tag in tags else lark_literal(tag) for tag in (CALL, END_CALL))
    form = _xml if reply_format.calls == "xml" else _hermes
    start = "start: call" if single else f"start: call ({_LINE_END} call)*"
    rules = [start, f"call: {opening} {_LINE_END} body {_LINE_END} {closing}", *form(chosen)]
    return Grammar.lark("\n".join(rules))


def bound_calls(
    reply_format: ReplyFormat,
    tools: Sequence[Mapping[str, Any]],
    *,
    in_thought: bool = False,
    tags: Collection[str] = (),
) -> Grammar | None:
    """The grammar of the calls in answers that are free to call a tool or not: where one is begun, it is a call of one
    of ``tools``, and of its schema if that is "strict". None where no tool is."""
    functions = [tool.get("function", tool) for tool in tools]
    if not any(function.get("strict") is True for function in functions):
        return None
    chosen = [_tool(f) if f.get("strict") is True else _Tool(_name(f), None) for f in functions]
    if reply_format.calls == "react":
        rules = [f"start: {lark_literal(_ACTION + ' ')} call", *_react_calls(chosen)]
        begins = Begins((_ACTION,), again=False, not_after=_FINAL_ANSWER, within_line=in_thought)
        return Grammar("lark", "\n".join(rules), begins=begins)
    opening, closing = (tag if tag in tags else lark_literal(tag) for tag in (CALL, END_CALL))
    call = f"call: {opening} {_LINE_END} body {_LINE_END} {closing}"
    if reply_format.calls == "xml":  # a function counts without the tag in front
        return Grammar(
            "lark", "\n".join(["start: call | body", call, *_xml(chosen)]), begins=Begins((CALL, FUNCTION))
        )
    return Grammar("lark", "\n".join(["start: call", call, *_hermes(chosen)]), begins=Begins((CALL,)))


def or_calls(
    grammar: Grammar,
    reply_format: ReplyFormat,
    tools: Sequence[Mapping[str, Any]],
    *,
    single: bool = False,
    tags: Collection[str] = (),
) -> Grammar:
    """The grammar of answers that are JSON as asked for, or calls of the tools instead. A grammar of another kind, and
    the ReAct form, whose answers begin with a thought, leave no call: they are given back as they are."""
    if grammar.kind != "json_schema" or reply_format.calls not in ("hermes", "xml"):
        return grammar
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError):  # whoever compiles it says what is wrong
        return grammar
    if not isinstance(schema, dict):
        return grammar
    calls = call_grammar(reply_format, tools, single=single, tags=tags)
    return Grammar.lark(f"start: calls | {_json(schema)}\n{calls.text.replace('start:', 'calls:', 1)}")


def _hermes(tools: list[_Tool]) -> list[str]:
    rules, close = [], lark_literal("}")
    for i, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
        arguments = _json({"type": "object"} if tool.schema is None else tool.schema)
        rules.append(f"body_{i}: {lark_literal(head)} {arguments} {close}")
    return [_one_of("body", len(rules)), *rules]


def _react_calls(tools: list[_Tool]) -> list[str]:
    calls = [_one_of("call", len(tools))]
    for i, tool in enumerate(tools):
        head = lark_literal(f"{tool.name}\nAction Input: ")
        calls.append(f"call_{i}: {head} {'ANY' if tool.schema is None else _json(tool.schema)}")
    return [*calls, f"ANY: {_ANY_INPUT}"] if any(tool.schema is None for tool in tools) else calls


def _react(tools: list[_Tool], in_thought: bool) -> str:
    action = lark_literal("Action: ")
    start = "THOUGHT call" if in_thought else f"(THOUGHT | {action}) call"
    thought = _THOUGHT % ("" if in_thought else "Thought:")
    return "\n".join([f"start: {start}", f"THOUGHT: {thought}", *_react_calls(tools)])


def _xml(tools: list[_Tool]) -> list[str]:
    rules, values = [], _Values()
    for i, tool in enumerate(tools):
        if not re.fullmatch(r"[^\s<>]{1,256}", tool.name):
            raise _unwritable(f"the tool {shown(tool.name)}", "no name with white space, < or > is read")
        inside = ["ANY"]
        if tool.schema is not None:
            inside = [*_parameters(tool.name, tool.schema, values), lark_literal(END_FUNCTION)]
        head = lark_literal(f"{FUNCTION}{tool.name}>\n")
        rules.append(f"body_{i}: {' '.join([head, *inside])}")
    if any(tool.schema is None for tool in tools):
        rules.append(f"ANY: {_ANY_FUNCTION}")
    return [_one_of("body", len(tools)), *rules, *values.rules]


def _parameters(tool: str, schema_of_all: dict[str, Any], values: _Values) -> list[str]:
    properties = schema_of_all.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    required = schema_of_all.get("required")
    required = required if isinstance(required, list) else []
    known = ParameterSchema(schema_of_all)
    names = ("$defs", "definitions")
    shared: dict[str, Any] = {name: schema_of_all[name] for name in names if name in schema_of_all}
    terms = []
    for key in [*properties, *(k for k in required if isinstance(k, str) and k not in properties)]:
        if re.fullmatch(r"[^<>\n]+", key) is None:
            if key in required:
                raise _unwritable(
                    f"the parameter {shown(key)} of {shown(tool)}", "< and > are no part of one"
                )
            continue
        head = lark_literal(f"{PARAMETER}{key}>")
        schema = properties.get(key)
        schema = schema if isinstance(schema, dict) else {}
        if known.may_be_text(key):
            value = values.text(schema)
        else:
            value = f"{_LINE_END} {_json({**shared, **schema})} {_END_VALUE}"
        terms.append(f"({head} {value}){'' if key in required else '?'}")
    return terms


class _Values:
    """The terminals of text parameters, one for each kind."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    @property
    def rules(self) -> list[str]:
        return [f"{name}: {_VALUE % pattern}" for pattern, name in self._names.items()]

    def text(self, schema: Mapping[str, Any]) -> str:
        """What stands for a value of this schema, which may be a text."""
        listed = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(listed, list) and listed and all(isinstance(v, str) and "<" not in v for v in listed):
            return "(" + " | ".join(lark_literal(f"\n{v}\n</parameter>\n") for v in listed) + ")"
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        pattern = ".*"
        if schema.get("type") == "string" and type(least) is int and 0 <= least <= _MAX_LENGTH:
            bounded = type(most) is int and least <= most <= _MAX_LENGTH
            if bounded or least:
                pattern = f".{{{least},{most if bounded else ''}}}"
        return self._names.setdefault(pattern, f"TEXT_{len(self._names)}")


def _tool(function: Mapping[str, Any]) -> _Tool:
    parameters = function.get("parameters")
    if isinstance(parameters, (list, tuple)):  # Qwen-1's own form
        listed = [p for p in parameters if isinstance(p, Mapping) and isinstance(p.get("name"), str)]
        parameters = {
            "type": "object",
            "properties": {p["name"]: p.get("schema") or {} for p in listed},
            "required": [p["name"] for p in listed if p.get("required")],
        }
    schema = _kept(dict(parameters or {}), function.get("strict") is True)
    schema.setdefault("type", "object")
    open_ended = ("patternProperties", "$ref", "allOf", "anyOf", "oneOf")
    if not any(word in schema for word in open_ended):  # arguments are not made up
        schema.setdefault("properties", {})
        schema.setdefault("additionalProperties", False)
    return _Tool(_name(function), schema)


def _name(function: Mapping[str, Any]) -> str:
    return str(function.get("name_for_model") or function.get("name"))


def _kept(schema: Any, strict: bool) -> Any:
    """The schema without words, and without what no grammar can keep to where that may be left out."""
    if isinstance(schema, (list, tuple)):
        return [_kept(part, strict) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _WORDS or (key in _UNKEPT and not strict):
            continue
        if key in _NAMED and isinstance(value, Mapping):
            out[key] = {name: _kept(part, strict) for name, part in value.items()}
        elif key == "oneOf" and not strict and "anyOf" not in schema:
            out["anyOf"] = _kept(value, strict)
        else:
            out[key] = value if key in _DATA else _kept(value, strict)
    return out


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps(schema, ensure_ascii=False)


def _one_of(rule: str, count: int) -> str:
    return f"{rule}: " + " | ".join(f"{rule}_{i}" for i in range(count))


def _unwritable(what: str, found: str) -> RequestError:
    return RequestError(f"a call of {what}", f"{found} in this model's form of calls", "Rename it.")
