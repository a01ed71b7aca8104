"""Anthropic's Messages: requests. `anthropic_answers.py` has the answers."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from qwenrt.errors import shown
from qwenrt.structure import Grammar
from qwenrt.text.dialects import decoding
from qwenrt.text.dialects.anthropic_answers import Extra
from qwenrt.text.dialects.anthropic_answers import Writer as Writer
from qwenrt.text.dialects.anthropic_answers import count_body as count_body
from qwenrt.text.dialects.anthropic_answers import error_body as error_body
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.decoding import bad, blamed_on, said
from qwenrt.text.dialects.problem import Problem
from qwenrt.text.dialects.signed_thoughts import SignedThoughts
from qwenrt.text.dialects.turns import Turns

_NOT_PROMPT = (
    "x-anthropic-"  # a block that begins so is a header in disguise, which changes with every session
)
_REMINDER = "<system-reminder>"  # a text of the user that begins so was written by the client
_NO_TYPE = (None, "custom")
_HOSTED = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Block(Struct):
    """A block of content: text, thinking, redacted_thinking, tool_use or tool_result."""

    type: str
    text: str = ""
    thinking: str = ""
    signature: str | None = None
    data: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None
    tool_use_id: str = ""
    content: str | list[Block] | None = None
    is_error: bool | None = None


class Message(Struct):
    """One message; what the client marks for caches is passed over."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Block]


class Tool(Struct):
    """A tool of the client; other types than "custom" are the vendor's own."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Struct):
    type: str
    schema: dict[str, Any] | bool | None = None


class OutputConfig(Struct):
    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(Struct):
    """The body of POST /v1/messages/count_tokens."""

    messages: list[Message]
    model: str = ""
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    thread: Any = None


class Request(CountRequest, kw_only=True):
    """The body of POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | UnsetType | None = UNSET
    top_p: float | UnsetType | None = UNSET
    top_k: int | UnsetType | None = UNSET
    stream: bool | None = None


def decode(body: bytes) -> Request:
    """The body of a request for a message. Raises Problem."""
    return decoding.decode(body, Request)


def decode_count(body: bytes) -> CountRequest:
    """The body of a request to count tokens, which has all of a message's fields but sampling. Raises Problem."""
    return decoding.decode(body, CountRequest)


def read(request: CountRequest, thoughts: SignedThoughts) -> Ask:
    """What a request asks for. Raises Problem for what cannot be served, with its JSON path.

    thoughts: signs the thoughts of the answer, and knows those that come back.
    """
    _no_thread(request)
    tools, ignored = _tools(request.tools or [])
    messages = _messages(request, thoughts)
    sampling = _sampling(request)
    stop = tuple(sampling.get("stop", ()))
    return Ask(
        model=request.model,
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(request.tool_choice, tools, ignored),
        parallel_tool_calls=not (request.tool_choice and request.tool_choice.disable_parallel_tool_use),
        sampling=sampling,
        **_thinking(request),
        stream=bool(request.stream) if isinstance(request, Request) else False,
        include_usage=True,
        ignored=ignored,
        extra=Extra(thoughts, stop, hidden=bool(request.thinking and request.thinking.display == "omitted")),
    )


def _no_thread(request: CountRequest) -> None:
    """A conversation that the server would hold. The vendor's tool runner asks for one, reads this refusal, and sends
    all messages from then on; passed over in silence it would send only what is new."""
    if request.thread is not None:
        found = "thread: conversations are not held here. Leave it out and send all messages."
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise Problem("invalid_request", found, param="thread", details=details)


def _messages(request: CountRequest, thoughts: SignedThoughts) -> list[dict[str, Any]]:
    if not request.messages:
        raise bad("messages", "an empty list", "Send at least one message.")
    turns = Turns(_system(request.system))
    for i, message in enumerate(request.messages):
        place = f"messages[{i}].content"
        content = message.content
        blocks = [Block("text", text=content)] if isinstance(content, str) else content
        if message.role == "assistant":
            _assistant(turns, blocks, place, thoughts)
        elif message.role == "user":
            _user(turns, blocks, place)
        else:
            turns.system(_joined(blocks, place))
    messages = turns.messages()
    if not messages or messages[-1]["role"] == "system":
        raise bad("messages", "there are only system messages", "Send a message of the user.")
    if messages[-1].get("tool_calls"):
        found = "it ends with a tool_use that has no result"
        raise bad(f"messages[{len(request.messages) - 1}]", found, "Send a tool_result for each tool_use.")
    return messages


def _system(system: str | list[Block] | None) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    return _joined(system, "system")


def _joined(blocks: list[Block], place: str) -> str:
    """The texts of a system message, without those that are no prompt."""
    texts = [_text(block, f"{place}[{j}]") for j, block in enumerate(blocks)]
    return "\n\n".join(text for text in texts if text and not text.startswith(_NOT_PROMPT))


def _assistant(turns: Turns, blocks: list[Block], place: str, thoughts: SignedThoughts) -> None:
    turns.said("")  # an empty message is a turn as well
    begins_message = True
    for j, block in enumerate(blocks):
        if block.type == "thinking":
            _thought(turns, block, thoughts)
        elif block.type == "redacted_thinking":
            thought = thoughts.unpacked(block.data)
            if thought:
                turns.thought(thought)
        elif block.type == "tool_use":
            name = decoding.tool_name(block.name, f"{place}[{j}].name")
            if not block.id:
                raise bad(f"{place}[{j}].id", "it is missing", "Send the id of the tool_use.")
            turns.call(block.id, name, _json(block.input or {}))
        else:
            turns.said(_text(block, f"{place}[{j}]"), begins_message)
            begins_message = False


def _thought(turns: Turns, block: Block, thoughts: SignedThoughts) -> None:
    """A thought that returns unchanged. One that was not shown stands in its signature."""
    signature = block.signature or ""
    thought = block.thinking if thoughts.is_ours(block.thinking, signature) else None
    if not block.thinking:
        thought = thoughts.unpacked(signature)
    if thought:
        turns.thought(thought)


def _user(turns: Turns, blocks: list[Block], place: str) -> None:
    if not blocks:
        turns.user("")
    for j, block in enumerate(blocks):
        here = f"{place}[{j}]"
        if block.type == "tool_result":
            if block.tool_use_id not in turns.calls:
                found = f"{shown(block.tool_use_id)} is the id of no tool_use in the message before"
                raise bad(f"{here}.tool_use_id", found, "A tool_result follows its tool_use.")
            turns.result(block.tool_use_id, _result(block, here))
            continue
        text = _text(block, here)
        if text.startswith(_REMINDER):
            turns.aside(text)
        else:
            turns.user(text)


def _result(block: Block, place: str) -> str:
    content = block.content
    if isinstance(content, list):
        content = "\n\n".join(_text(inner, f"{place}.content[{k}]") for k, inner in enumerate(content))
    return f"Error: {content or ''}" if block.is_error else content or ""


def _text(block: Block, place: str) -> str:
    if block.type == "text":
        return block.text
    if block.type in ("image", "document"):
        raise bad(place, f"a block of type {block.type}", "This model reads text only: send it as text.")
    known = "text, thinking, redacted_thinking, tool_use and tool_result"
    raise bad(f"{place}.type", f"got {shown(block.type)}", f"Read here are {known}, each in its place.")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _tools(tools: list[Tool]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The client's tools in OpenAI's shape, and the types of those that only the vendor's servers have."""
    functions: list[dict[str, Any]] = []
    ignored = []
    for i, tool in enumerate(tools):
        if tool.type not in _NO_TYPE:
            ignored.append(tool.type if _HOSTED.fullmatch(tool.type or "") else "tool")
            continue
        name = decoding.tool_name(tool.name or "", f"tools[{i}].name")
        function: dict[str, Any] = {"name": name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = tool.input_schema or {"type": "object", "properties": {}}
        if tool.strict:
            function["strict"] = True
        functions.append({"type": "function", "function": function})
    decoding.checked_tools(functions, name=".name", parameters=".input_schema")
    return functions, tuple(dict.fromkeys(ignored))


def _tool_choice(
    choice: ToolChoice | None, tools: list[dict[str, Any]], ignored: tuple[str, ...]
) -> str | dict[str, str]:
    """A choice of what is not served here is left to the model."""
    if choice is None or choice.type in ("auto", "none"):
        return "none" if choice is not None and choice.type == "none" else "auto"
    known = [tool["function"]["name"] for tool in tools]
    if ignored and (not tools or (choice.type == "tool" and choice.name not in known)):
        return "auto"
    if not tools:
        raise bad("tool_choice", f"type {choice.type} without tools", "Send the tools to choose from.")
    if choice.type == "any":
        return "required"
    return decoding.chosen_tool(choice.name or "", tools, "tool_choice.name")


def _thinking(request: CountRequest) -> dict[str, Any]:
    """Ask's fields of the thought. In this dialect a request that does not ask for thoughts gets
    none: its client takes the first block for the answer."""
    config, thinking = request.output_config, request.thinking
    effort = decoding.checked_effort(config.effort if config else None, "output_config.effort")
    if thinking is None or thinking.type == "disabled":
        return {"enable_thinking": False}
    if thinking.budget_tokens is not None:
        decoding.between("thinking.budget_tokens", thinking.budget_tokens, 1, 2**63 - 1)
    return {
        "enable_thinking": True,
        "thinking_budget": thinking.budget_tokens,
        "reasoning_effort": effort,
    }


def _sampling(request: CountRequest) -> dict[str, Any]:
    also: dict[str, Any] = {}
    grammar = _grammar(request)
    if grammar is not None:
        also["grammar"] = grammar
    if not isinstance(request, Request):
        return also
    names = {
        "max_tokens": "max_tokens",
        "stop_sequences": "stop",
        "temperature": "temperature",
        "top_k": "top_k",
    }
    if said(request.top_p) == 0:  # the smallest set of tokens there is: the likeliest one
        also["top_k"] = 1
        del names["top_k"]
    else:
        names["top_p"] = "top_p"
    return decoding.sampling_from(request, names, also=also)


def _grammar(request: CountRequest) -> Grammar | None:
    config = request.output_config
    for wanted, place in (
        (config.format if config else None, "output_config.format"),
        (request.output_format, "output_format"),
    ):
        if wanted is None:
            continue
        if wanted.type != "json_schema" or wanted.schema is None:
            found = f"type {shown(wanted.type)}" if wanted.type != "json_schema" else "it has no schema"
            raise bad(place, found, 'Send {"type": "json_schema", "schema": {...}}.')
        with blamed_on(f"{place}.schema"):
            return Grammar.json_schema(wanted.schema)
    return None
