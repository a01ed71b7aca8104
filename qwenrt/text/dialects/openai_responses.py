"""OpenAI's Responses: requests. `responses_answers.py` has the answers, `responses_tools.py` the tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from qwenrt.errors import shown
from qwenrt.structure import Grammar
from qwenrt.text.dialects import decoding
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.decoding import bad, blamed_on, checked_effort, said
from qwenrt.text.dialects.openai_bodies import error_body as error_body
from qwenrt.text.dialects.responses_answers import Writer as Writer
from qwenrt.text.dialects.responses_answers import count_body as count_body
from qwenrt.text.dialects.responses_answers import deleted_body as deleted_body
from qwenrt.text.dialects.responses_items import Extra
from qwenrt.text.dialects.responses_tools import (
    Tool,
    ToolChoice,
    arguments_of_custom,
    chosen,
    joined,
    served_tools,
)
from qwenrt.text.dialects.signed_thoughts import SignedThoughts
from qwenrt.text.dialects.turns import Turns
from qwenrt.text.replies.strict_json import refuse_constant, unique_keys

_ENCRYPTED = "reasoning.encrypted_content"
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class Part(Struct, omit_defaults=True):
    """A part of an item: text under one of its names, or a refusal."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(Struct, omit_defaults=True):
    """An item of a conversation: message, reasoning, function_call, custom_tool_call, or the output of a call."""

    type: str = "message"
    role: str | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None


class Reasoning(Struct):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextFormat(Struct):
    type: str
    name: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None
    description: str | None = None


class Text(Struct):
    format: TextFormat | None = None
    verbosity: str | None = None


class CountRequest(Struct):
    """The body of POST /v1/responses/input_tokens."""

    model: str = ""
    input: str | list[Item] | None = None
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None


class Request(CountRequest, kw_only=True):
    """The body of POST /v1/responses."""

    max_output_tokens: int | UnsetType | None = UNSET
    temperature: float | UnsetType | None = UNSET
    top_p: float | UnsetType | None = UNSET
    stream: bool | None = None
    store: bool | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    truncation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def decode(body: bytes) -> Request:
    """The body of a request for a response. Raises Problem."""
    return decoding.decode(body, Request)


def decode_count(body: bytes) -> CountRequest:
    """The body of a request to count tokens. Raises Problem."""
    return decoding.decode(body, CountRequest)


def read(request: CountRequest, thoughts: SignedThoughts, earlier: bytes = b"[]") -> Ask:
    """What a request asks for. Raises Problem for what cannot be served, with its JSON path.

    thoughts: packs the thoughts of the answer, and knows those that come back. earlier: the items of the response that
    the request names as the previous one, as `kept_items` gave them.
    """
    for name in ("conversation", "prompt"):
        if getattr(request, name) is not None:
            raise bad(name, "it is kept at the vendor's", "Send the items and instructions themselves.")
    if isinstance(request, Request) and not request.model:
        raise bad("model", "it is missing", "Send it.")
    given = request.input
    items = [Item(role="user", content=given)] if isinstance(given, str) else given or []
    before = msgspec.json.decode(earlier, type=list[Item])
    if not items and not before:
        raise bad("input", "it is empty", "Send a text or a list of items.")
    tools = served_tools(request.tools or ())
    tool_choice, functions = chosen(request.tool_choice, tools)
    effort = checked_effort(request.reasoning.effort if request.reasoning else None, "reasoning.effort")
    messages = _messages(request.instructions or "", before, items, thoughts)
    full = request if isinstance(request, Request) else None
    store = full is not None and full.store is not False
    return Ask(
        model=request.model,
        messages=messages,
        tools=functions,
        tool_choice=tool_choice,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        sampling=_sampling(request),
        reasoning_effort=effort,
        stream=bool(full and full.stream),
        include_usage=True,
        ignored=tools.ignored,
        extra=Extra(
            thoughts,
            tools.names,
            _echo(request),
            packs=bool(full and full.include and _ENCRYPTED in full.include),
            summary=_wants_summary(request.reasoning),
            store=store,
            items=msgspec.json.encode([*before, *items]) if store else b"[]",
        ),
    )


def _wants_summary(reasoning: Reasoning | None) -> bool:
    """Whether the thought is to come as its own summary: who asks for one shows it to a person."""
    asked = reasoning is not None and (reasoning.summary or reasoning.generate_summary)
    return bool(asked) and asked != "none"


def kept_items(ask: Ask, writer: Writer) -> bytes:
    """All items of a conversation, the finished answer's included, as JSON: what `read` takes as ``earlier``."""
    items: bytes = ask.extra.items
    output = msgspec.json.encode(msgspec.convert(writer.response["output"], type=list[Item]))
    # a list of many is not read again for a few more
    between = b"," if len(items) > 2 and len(output) > 2 else b""
    return items[:-1] + between + output[1:]


def _messages(
    instructions: str, before: list[Item], items: list[Item], thoughts: SignedThoughts
) -> list[dict[str, Any]]:
    turns = Turns(instructions)
    for place, some in (("previous_response_id", before), ("input", items)):
        for i, item in enumerate(some):
            read_item = _ITEMS.get(item.type)
            if read_item is None:
                known = ", ".join(_ITEMS)
                found = f"an item of type {shown(item.type)}"
                raise bad(f"{place}[{i}]", found, f"Read here are {known}.")
            read_item(turns, item, f"{place}[{i}]", thoughts)
    messages = turns.messages()
    if not messages or messages[-1]["role"] == "system":
        raise bad("input", "there are only system messages", "Send a message of the user.")
    if messages[-1].get("tool_calls"):
        found = "it ends with a call that has no output"
        raise bad("input", found, "Send the output of each call.")
    return messages


def _message(turns: Turns, item: Item, place: str, thoughts: SignedThoughts) -> None:
    text = _text(item.content, f"{place}.content")
    if item.role == "user":
        turns.user(text)
    elif item.role == "assistant":
        turns.said(text, begins_message=True)
    elif item.role in ("system", "developer"):
        turns.system(text)
    else:
        raise bad(
            f"{place}.role", f"got {shown(item.role)}", "Known are user, assistant, system and developer."
        )


def _reasoning(turns: Turns, item: Item, place: str, thoughts: SignedThoughts) -> None:
    """What was packed counts if it is unchanged; where nothing was, the text that the client was given."""
    thought: str | None
    if item.encrypted_content is not None:
        thought = thoughts.unpacked(item.encrypted_content)
    elif item.content:
        thought = _text(item.content, f"{place}.content")
    else:
        thought = _text(item.summary, f"{place}.summary")
    if thought:
        turns.thought(thought)


def _function_call(turns: Turns, item: Item, place: str, thoughts: SignedThoughts) -> None:
    turns.call(_call_id(item, place), _name(item, place), _arguments(item.arguments or ""))


def _arguments(text: str) -> str:
    """Arguments as a chat template can write them. An object that breaks off, as an answer cut by max_output_tokens
    leaves one, would be refused in every later turn: it becomes a text in an object."""
    if not text.strip():
        return "{}"
    if not text.lstrip().startswith("{"):
        return text  # of a model whose calls hold any text
    try:
        json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return arguments_of_custom(text)
    return text


def _custom_call(turns: Turns, item: Item, place: str, thoughts: SignedThoughts) -> None:
    turns.call(_call_id(item, place), _name(item, place), arguments_of_custom(item.input or ""))


def _output(turns: Turns, item: Item, place: str, thoughts: SignedThoughts) -> None:
    call_id = _call_id(item, place)
    if call_id not in turns.calls:
        found = f"{shown(call_id)} is the id of no call before it"
        raise bad(f"{place}.call_id", found, "An output follows its call.")
    turns.result(call_id, _text(item.output, f"{place}.output"))


_ITEMS: dict[str, Callable[[Turns, Item, str, SignedThoughts], None]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _function_call,
    "function_call_output": _output,
    "custom_tool_call": _custom_call,
    "custom_tool_call_output": _output,
}


def _call_id(item: Item, place: str) -> str:
    if not item.call_id:
        raise bad(f"{place}.call_id", "it is missing", "Send the id of the call.")
    return item.call_id


def _name(item: Item, place: str) -> str:
    return decoding.tool_name(joined(item.name or "", item.namespace), f"{place}.name")


def _text(content: str | list[Part] | None, place: str) -> str:
    """A content's text: its parts, each a paragraph of its own but for those of an answer, which was one text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for k, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text if part.type in _TEXTS else None
        if text is None:
            remedy = "This model reads text only: send it as input_text or output_text."
            raise bad(f"{place}[{k}]", f"a part of type {shown(part.type)}", remedy)
        texts.append(text)
    written = any(part.type in ("output_text", "reasoning_text") for part in content)
    return ("" if written else "\n\n").join(texts)


def _sampling(request: CountRequest) -> dict[str, Any]:
    also: dict[str, Any] = {}
    grammar = _grammar(request.text.format if request.text else None)
    if grammar is not None:
        also["grammar"] = grammar
    if not isinstance(request, Request):
        return also
    names = {"max_output_tokens": "max_tokens", "temperature": "temperature"}
    if said(request.top_p) == 0:  # the smallest set of tokens there is: the likeliest one
        also["top_k"] = 1
    else:
        names["top_p"] = "top_p"
    return decoding.sampling_from(request, names, also=also)


def _grammar(wanted: TextFormat | None) -> Grammar | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar.json_object()
    if wanted.type != "json_schema" or wanted.schema is None:
        found = f"type {shown(wanted.type)}" if wanted.type != "json_schema" else "it has no schema"
        raise bad("text.format", found, "Known are text, json_object, and json_schema with its schema.")
    with blamed_on("text.format.schema"):
        return Grammar.json_schema(wanted.schema)


def _echo(request: CountRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    full = request if isinstance(request, Request) else Request()
    temperature, top_p = said(full.temperature), said(full.top_p)
    wanted = request.text.format if request.text else None
    reasoning = request.reasoning or Reasoning()
    return {
        "instructions": request.instructions,
        "max_output_tokens": said(full.max_output_tokens),
        "max_tool_calls": None,
        "metadata": full.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": full.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "safety_identifier": full.safety_identifier,
        "service_tier": "default",
        "store": full.store is not False,
        "temperature": 1.0 if temperature is None else temperature,
        "text": {"format": _echoed_format(wanted)},
        "tool_choice": _echoed_choice(request.tool_choice),
        "tools": [_echoed_tool(tool) for tool in request.tools or ()],
        "top_logprobs": 0,
        "top_p": 1.0 if top_p is None else top_p,
        "truncation": "disabled",
        "user": full.user,
    }


def _echoed_format(wanted: TextFormat | None) -> dict[str, Any]:
    if wanted is None or wanted.type != "json_schema":
        return {"type": "text" if wanted is None else wanted.type}
    return {
        "type": wanted.type,
        "name": wanted.name or "",
        "description": wanted.description,
        "schema": wanted.schema,
        "strict": bool(wanted.strict),
    }


def _echoed_choice(choice: str | ToolChoice | None) -> Any:
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    if choice.type == "allowed_tools":
        return {"type": choice.type, "mode": choice.mode, "tools": choice.tools}
    return {"type": choice.type, "name": choice.name}


def _echoed_tool(tool: Tool) -> Any:
    if tool.type != "function":
        return tool
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
