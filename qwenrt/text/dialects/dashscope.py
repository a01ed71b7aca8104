"""What DashScope's clients ask: /api/v1/services/aigc/text-generation/generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from qwenrt.errors import shown
from qwenrt.structure import Grammar
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.decoding import (
    bad,
    between,
    blamed_on,
    checked_effort,
    checked_tools,
    chosen_tool,
    sampling_from,
    tool_name,
)
from qwenrt.text.dialects.decoding import decode as decode_body
from qwenrt.text.dialects.problem import Kind, Problem

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "tool": "tool",
}
MAX_N = 4
MAX_TOP_LOGPROBS = 5
LARGEST_TOP_K = 100  # beyond it DashScope keeps all tokens

CODES: dict[Kind, str] = {
    "invalid_json": "InvalidParameter",
    "invalid_request": "InvalidParameter",
    "context_length": "InvalidParameter",
    "unauthorized": "InvalidApiKey",
    "forbidden": "AccessDenied",
    "not_found": "ModelNotFound",
    "method_not_allowed": "UnsupportedOperation",
    "too_large": "BadRequest.TooLarge",
    "queue_full": "Throttling.RateQuota",
    "queue_timeout": "ModelServingError",
    "timeout": "RequestTimeOut",
    "unavailable": "ModelUnavailable",
    "not_implemented": "UnsupportedOperation",
    "internal": "InternalError",
}


class Part(msgspec.Struct):
    """A part of a content, with or without OpenAI's ``type``."""

    text: str | None = None
    type: str | None = None


class CalledFunction(msgspec.Struct):
    """A function that was called; its arguments are JSON text, or the object."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(msgspec.Struct):
    """A call in an assistant's message."""

    function: CalledFunction
    id: str | None = None


class Message(msgspec.Struct):
    """One message. ``partial``: it is the last one, and its text is to be continued."""

    role: str
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    partial: bool | None = None


class Turn(msgspec.Struct):
    """A pair of the older ``history``."""

    user: str | None = None
    bot: str | None = None


class Input(msgspec.Struct):
    """What is to be answered: messages; or a history, and a prompt after it."""

    messages: list[Message] | None = None
    prompt: str | None = None
    history: list[Turn] | None = None


class Tool(msgspec.Struct):
    """A tool; of those that are no functions the type is told in Ask.ignored."""

    type: str | None = None
    function: dict[str, Any] | None = None


class NamedFunction(msgspec.Struct):
    """The function in a tool_choice."""

    name: str


class ToolChoice(msgspec.Struct):
    """A tool_choice that names a function."""

    function: NamedFunction


class JsonSchema(msgspec.Struct):
    """The json_schema of a response_format; its name and ``strict`` change nothing."""

    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct):
    """ "text", "json_object", or "json_schema" with a schema."""

    type: str
    json_schema: JsonSchema | None = None


class Parameters(msgspec.Struct):
    """How to answer, and in which form to say it."""

    result_format: str | None = None
    incremental_output: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | list[str | int | list[int]] | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    reasoning_effort: str | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    enable_search: bool | None = None


class GenerationRequest(msgspec.Struct):
    """The body of a request."""

    input: Input
    model: str = ""
    parameters: Parameters | None = None


@dataclass(frozen=True)
class Form:
    """Ask.extra: how the answer is written. as_message: as choices with a message, else as one text. incremental:
    events say what is new, else all so far."""

    as_message: bool = False
    incremental: bool = False


def decode(body: bytes) -> GenerationRequest:
    """The body of a request. Raises Problem."""
    return decode_body(body, GenerationRequest)


def wants_stream(headers: Mapping[str, str]) -> bool:
    """Whether the headers, whose names are in lower case, ask for events."""
    events = headers.get("x-dashscope-sse", "").strip().lower() == "enable"
    return events or "text/event-stream" in headers.get("accept", "").lower()


def read(
    request: GenerationRequest,
    stream: bool = False,
    text_of: Callable[[Sequence[int]], str] | None = None,
) -> Ask:
    """What a body asks for. stream: as `wants_stream` has it. text_of: the text of token ids, which several of them
    as one stop need. Raises Problem."""
    wanted = request.parameters or Parameters()
    tools, ignored = _tools(wanted.tools or ())
    messages = _conversation(request.input)
    if wanted.enable_search:
        ignored.append("enable_search")
    form = wanted.result_format or "text"
    if form not in ("text", "message"):
        raise bad("parameters.result_format", f"got {shown(form)}", 'It must be "text" or "message".')
    sampling = _sampling(wanted, text_of)
    # A text has no place for calls, nor for several choices.
    as_message = form == "message" or bool(tools) or sampling.get("n", 1) > 1
    return Ask(
        model=request.model,
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(wanted.tool_choice, tools),
        parallel_tool_calls=wanted.parallel_tool_calls is not False,
        sampling=sampling,
        enable_thinking=wanted.enable_thinking,
        thinking_budget=_budget(wanted),
        reasoning_effort=checked_effort(wanted.reasoning_effort, "parameters.reasoning_effort"),
        stream=stream,
        ignored=tuple(ignored),
        extra=Form(as_message, bool(wanted.incremental_output)),
    )


def error_body(problem: Problem, request_id: str = "") -> dict[str, str]:
    """The body of an answer that is a problem, and the data of an event that is one."""
    message = problem.message
    if problem.kind == "context_length":  # in DashScope's own words as well
        message = f"Range of input length should be [1, {max(problem.max_tokens - 1, 1)}]. {message}"
    return {"code": CODES[problem.kind], "message": message, "request_id": request_id}


def _budget(wanted: Parameters) -> int | None:
    """The longest thought; where there is to be none, its length says nothing."""
    budget = wanted.thinking_budget
    if budget is not None and budget < 1:
        found = f"got {shown(budget)}"
        raise bad(
            "parameters.thinking_budget", found, "It must be at least 1; enable_thinking turns thoughts off."
        )
    return None if wanted.enable_thinking is False else budget


def _sampling(wanted: Parameters, text_of: Callable[[Sequence[int]], str] | None) -> dict[str, Any]:
    """The fields of SamplingParams that a request sets, within DashScope's own ranges."""
    if wanted.temperature is not None and wanted.temperature >= 2:
        raise bad("parameters.temperature", f"got {shown(wanted.temperature)}", "It must be in [0, 2).")
    ranges = (("presence_penalty", -2, 2), ("n", 1, MAX_N), ("seed", 0, 2**63 - 1))
    for name, low, high in ranges:
        if (value := getattr(wanted, name)) is not None:
            between(f"parameters.{name}", value, low, high)
    also: dict[str, Any] = {"max_tokens": None, **_stop(wanted.stop, text_of)}
    if wanted.top_k is not None and wanted.top_k > LARGEST_TOP_K:
        wanted = msgspec.structs.replace(wanted, top_k=0)
    if wanted.top_logprobs is not None:
        between("parameters.top_logprobs", wanted.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if wanted.logprobs:
        also["logprobs"] = wanted.top_logprobs or 0
    grammar = _grammar(wanted.response_format)
    if grammar is not None:
        also["grammar"] = grammar
    same = (
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "max_tokens",
        "repetition_penalty",
        "presence_penalty",
        "n",
    )
    return sampling_from(wanted, {name: name for name in same}, at="parameters", also=also)


def _stop(
    wanted: str | list[str | int | list[int]] | None, text_of: Callable[[Sequence[int]], str] | None
) -> dict[str, Any]:
    """``stop`` and ``stop_token_ids``: of texts, of ids, and of lists of ids, which end a text in this order."""
    texts: list[str] = []
    ids: list[int] = []
    for index, entry in enumerate([wanted] if isinstance(wanted, str) else wanted or ()):
        if isinstance(entry, str):
            texts.append(entry)
        elif isinstance(entry, int) or len(entry) == 1:
            ids.append(entry if isinstance(entry, int) else entry[0])
        elif not entry or text_of is None or any(token < 0 for token in entry):
            found = f"got {shown(entry)}"
            raise bad(f"parameters.stop[{index}]", found, "Send a text, a token id, or several ids >= 0.")
        else:
            with blamed_on(f"parameters.stop[{index}]"):
                texts.append(text_of(entry))
    return {name: value for name, value in (("stop", texts), ("stop_token_ids", ids)) if value}


def _grammar(wanted: ResponseFormat | None) -> Grammar | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar.json_object()
    where = "parameters.response_format"
    if wanted.type != "json_schema":
        known = "Known are text, json_object and json_schema."
        raise bad(f"{where}.type", f"got {shown(wanted.type)}", known)
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise bad(f"{where}.json_schema.schema", "it is missing", "Send it.")
    with blamed_on(f"{where}.json_schema.schema"):
        return Grammar.json_schema(wanted.json_schema.schema)


def _tools(tools: Sequence[Tool]) -> tuple[list[dict[str, Any]], list[str]]:
    """The functions in OpenAI's shape, and the types of other tools."""
    functions: list[dict[str, Any]] = []
    ignored: list[str] = []
    for index, tool in enumerate(tools):
        kind = tool.type or "function"
        if kind != "function":
            ignored.append(tool_name(kind, f"parameters.tools[{index}].type"))
        elif tool.function is None:
            raise bad(f"parameters.tools[{index}].function", "it is missing", "Send it.")
        else:
            functions.append({"type": "function", "function": tool.function})
    return checked_tools(functions, "parameters.tools"), ignored


def _tool_choice(wanted: str | ToolChoice | None, tools: list[dict[str, Any]]) -> str | dict[str, str]:
    where = "parameters.tool_choice"
    if isinstance(wanted, ToolChoice):
        return chosen_tool(wanted.function.name, tools, where)
    if wanted not in (None, "auto", "none", "required"):
        raise bad(
            where, f"got {shown(wanted)}", 'Known are "auto", "none", "required" and a function by its name.'
        )
    if wanted == "required" and not tools:
        raise bad(where, "a call is required, and there are no tools", "Send tools, or leave it out.")
    return wanted or "auto"


def _conversation(given: Input) -> list[dict[str, Any]]:
    """The messages in OpenAI's shape: never empty."""
    messages = [_message(message, f"input.messages[{i}]") for i, message in enumerate(given.messages or ())]
    for turn in given.history or ():
        messages.append({"role": "user", "content": turn.user or ""})
        messages.append({"role": "assistant", "content": turn.bot or ""})
    if given.prompt:
        messages.append({"role": "user", "content": given.prompt})
    if not messages:
        raise bad("input", "it has neither messages nor a prompt", "Send one of the two.")
    return messages


def _message(message: Message, where: str) -> dict[str, Any]:
    role = ROLES.get(message.role)
    if role is None:
        raise bad(f"{where}.role", f"got {shown(message.role)}", f"Known are: {', '.join(ROLES)}.")
    written: dict[str, Any] = {"role": role, "content": _content(message.content, f"{where}.content")}
    if role == "tool" and message.tool_call_id is not None:
        written["tool_call_id"] = message.tool_call_id
    if role != "assistant":
        return written
    if message.reasoning_content:
        written["reasoning_content"] = message.reasoning_content
    calls = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls or ())]
    return written | ({"tool_calls": calls} if calls else {})


def _content(content: str | list[Part] | None, where: str) -> str:
    if not isinstance(content, list):
        return content or ""
    for index, part in enumerate(content):
        if part.text is None:
            raise bad(f"{where}[{index}]", "this model reads text only", "Leave out images, audio and video.")
    return "".join(part.text or "" for part in content)


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    name = tool_name(call.function.name, f"{where}.function.name")
    told = {} if call.id is None else {"id": call.id}
    return {**told, "type": "function", "function": {"name": name, "arguments": call.function.arguments}}
