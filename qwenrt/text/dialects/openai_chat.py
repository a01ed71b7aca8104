"""POST /v1/chat/completions, OpenAI's chats as vLLM extends them: from the body to an Ask.

Answers are written by `openai_chat_writer.ChatWriter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from qwenrt.errors import shown
from qwenrt.text.dialects import decoding
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.decoding import bad, checked_tools, chosen_tool, said, tool_name
from qwenrt.text.dialects.openai_bodies import error_body as error_body
from qwenrt.text.dialects.openai_fields import (
    Fields,
    Flag,
    TemplateKwargs,
    Text,
    Whole,
    Wishes,
    priority_of,
    sampling_of,
    thought_of,
    wishes_of,
)

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXTS = ("text", "input_text", "output_text", "refusal")


class Part(msgspec.Struct):
    """A part of a content: {"type": "text", "text": ...}. Other types are refused: the model reads text."""

    type: str
    text: Text = UNSET
    refusal: Text = UNSET


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] | UnsetType | None = UNSET


class ToolCall(msgspec.Struct):
    function: FunctionCall
    id: str | int | UnsetType | None = UNSET
    type: Text = UNSET


class ChatMessage(msgspec.Struct):
    """One message of a conversation. ``reasoning`` is another name for reasoning_content."""

    role: str
    content: str | list[str | Part] | UnsetType | None = UNSET
    name: Text = UNSET
    reasoning_content: Text = UNSET
    reasoning: Text = UNSET
    tool_calls: list[ToolCall] | UnsetType | None = UNSET
    function_call: FunctionCall | UnsetType | None = UNSET
    tool_call_id: str | int | UnsetType | None = UNSET


class ChatFields(Fields, kw_only=True):
    """All fields of a chat but the model's name and the messages."""

    tools: list[dict[str, Any]] | UnsetType | None = UNSET
    tool_choice: str | dict[str, Any] | UnsetType | None = UNSET
    parallel_tool_calls: Flag = UNSET
    functions: list[dict[str, Any]] | UnsetType | None = UNSET
    function_call: str | dict[str, Any] | UnsetType | None = UNSET
    max_completion_tokens: Whole = UNSET
    logprobs: Flag = UNSET
    top_logprobs: Whole = UNSET
    reasoning_effort: Text = UNSET
    enable_thinking: Flag = UNSET
    thinking_budget: Whole = UNSET
    chat_template_kwargs: TemplateKwargs | UnsetType | None = UNSET
    chat_template: Any = UNSET
    add_generation_prompt: Flag = UNSET
    continue_final_message: Flag = UNSET


class ChatRequest(ChatFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[ChatMessage]


def decode(body: bytes) -> ChatRequest:
    """The request in a body. Raises Problem."""
    return decoding.decode(body, ChatRequest)


def read(request: ChatRequest) -> Ask:
    """What it asks for; ``extra`` is the Wishes that ChatWriter needs. Raises Problem."""
    return read_with(request, request.model, request.messages)


def read_with(request: ChatFields, model: str, given: Sequence[ChatMessage]) -> Ask:
    """As `read`, of the fields, the model's name and the messages."""
    kwargs = said(request.chat_template_kwargs) or TemplateKwargs()
    _no_template(request, kwargs)
    if not given:
        raise bad("messages", "it is empty", "Send at least one message.")
    tools, ignored, old_calls = _tools(request)
    wishes = wishes_of(request, _logprobs(request), old_calls=old_calls)
    thought = thought_of(
        said(request.reasoning_effort), kwargs, said(request.enable_thinking), said(request.thinking_budget)
    )
    messages = [_message(f"messages[{i}]", message) for i, message in enumerate(given)]
    _check_end(request, messages)
    choice, tools = _choice(request, tools, old_calls)
    return Ask(
        model=model,
        messages=messages,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls is not False and not old_calls,
        sampling=_sampling(request, wishes),
        **thought,
        stream=request.stream is True,
        include_usage=wishes.usage,
        ignored=ignored,
        priority=priority_of(request),
        progress=request.return_progress is True,
        extra=wishes,
    )


def _no_template(request: ChatFields, kwargs: TemplateKwargs) -> None:
    for param, value in (
        ("chat_template", request.chat_template),
        ("chat_template_kwargs.chat_template", kwargs.chat_template),
    ):
        if said(value) is not None:
            raise bad(param, "a template in a request", "Templates come with the model; leave it out.")


def _logprobs(request: ChatFields) -> int | None:
    top = said(request.top_logprobs)
    if request.logprobs is True:
        return top or 0
    if top:
        raise bad("top_logprobs", f"got {shown(top)} without logprobs", 'Send "logprobs": true as well.')
    return None


def _sampling(request: ChatFields, wishes: Wishes) -> dict[str, Any]:
    limit = said(request.max_completion_tokens)
    param = "max_tokens" if limit is None else "max_completion_tokens"
    return sampling_of(request, wishes, "top_logprobs", limit_param=param, limit=limit)


# ---- messages


def _message(where: str, message: ChatMessage) -> dict[str, Any]:
    """In the shape that the chat formats read: contents are texts, names are those of the calls' own fields."""
    role = message.role
    if role not in ROLES:
        raise bad(f"{where}.role", f"got {shown(role)}", f"Known are: {', '.join(ROLES)}.")
    if message.content is UNSET and role != "assistant":
        raise bad(f"{where}.content", "it is missing", "Send it.")
    content = None if isinstance(message.content, UnsetType) else message.content
    plain: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": _content(f"{where}.content", content),
    }
    if name := said(message.name):
        plain["name"] = name
    if role == "assistant":
        plain.update(_of_assistant(where, message))
    elif role == "tool" and (answered := said(message.tool_call_id)) is not None:
        plain["tool_call_id"] = answered
    return plain


def _content(where: str, content: str | list[str | Part] | None) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        if part.type not in _TEXTS:
            found = f"a part of type {shown(part.type)}"
            raise bad(f"{where}[{i}].type", found, "This model reads text only: send parts of type text.")
        text = said(part.text)
        text = said(part.refusal) if text is None else text
        if text is None:
            raise bad(f"{where}[{i}].text", "it is missing", "Send it.")
        texts.append(text)
    return "".join(texts)


def _of_assistant(where: str, message: ChatMessage) -> dict[str, Any]:
    more: dict[str, Any] = {}
    reasoning = said(message.reasoning_content)
    reasoning = said(message.reasoning) if reasoning is None else reasoning
    if reasoning is not None:
        more["reasoning_content"] = reasoning
    calls = said(message.tool_calls)
    if calls:
        more["tool_calls"] = [
            {
                "id": said(call.id),
                "type": "function",
                "function": _call(f"{where}.tool_calls[{i}].function", call.function),
            }
            for i, call in enumerate(calls)
        ]
    elif old := said(message.function_call):
        more["function_call"] = _call(f"{where}.function_call", old)
    return more


def _call(where: str, call: FunctionCall) -> dict[str, Any]:
    arguments = said(call.arguments)
    return {
        "name": tool_name(call.name, f"{where}.name"),
        "arguments": "" if arguments is None else arguments,
    }


def _check_end(request: ChatFields, messages: list[dict[str, Any]]) -> None:
    """An assistant's text at the end is continued. Raise Problem for a request that wants anything else."""
    last, wanted = messages[-1], said(request.continue_final_message)
    begin = said(request.add_generation_prompt)
    can = last["role"] == "assistant" and not ("tool_calls" in last or "function_call" in last)
    if wanted and begin:
        found = "both it and add_generation_prompt"
        raise bad("continue_final_message", found, "An answer is continued, or a new one begins.")
    if wanted and not can:
        found = "the last message is no text of the assistant"
        raise bad("continue_final_message", found, "Put the beginning of the answer there.")
    if begin is False and not can:
        found = "false, and the last message is no text of the assistant"
        raise bad("add_generation_prompt", found, "Leave it out: an answer is written.")
    if can and (begin or wanted is False):
        param = "add_generation_prompt" if begin else "continue_final_message"
        found = f"{str(bool(begin)).lower()}, and the last message is a text of the assistant"
        raise bad(param, found, "It is continued here; for a new answer end with a message of the user.")


# ---- tools


def _tools(request: ChatFields) -> tuple[list[dict[str, Any]], tuple[str, ...], bool]:
    """The tools, the types of those that are not served, and whether they came as functions, the older name."""
    if functions := said(request.functions):
        if said(request.tools):
            raise bad("functions", "tools are there too", "Send tools; functions is their older name.")
        tools = [{"type": "function", "function": function} for function in functions]
        return checked_tools(tools, "functions", name=".name", parameters=".parameters"), (), True
    taken: list[dict[str, Any]] = []
    ignored = []
    for i, tool in enumerate(said(request.tools) or ()):
        kind, function = tool.get("type", "function"), tool.get("function")
        if not isinstance(kind, str):
            raise bad(f"tools[{i}].type", f"got {shown(kind)}", 'Send "function".')
        if kind != "function":
            ignored.append(kind[:64])
            continue
        if function is None and "name" in tool:
            function = {key: value for key, value in tool.items() if key != "type"}
        if not isinstance(function, dict):
            raise bad(f"tools[{i}].function", f"got {shown(function)}", "Send what describes the function.")
        taken.append({"type": "function", "function": function})
    return checked_tools(taken), tuple(ignored), False


def _choice(
    request: ChatFields, tools: list[dict[str, Any]], old_calls: bool
) -> tuple[str | dict[str, str], list[dict[str, Any]]]:
    """Ask.tool_choice, and the tools that may be chosen from."""
    param = "function_call" if old_calls else "tool_choice"
    choice = request.function_call if old_calls else request.tool_choice
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            return _among_allowed(choice, tools)
        named = choice if old_calls else choice.get("function")
        name = named.get("name") if isinstance(named, dict) else None
        if not isinstance(name, str):
            raise bad(param, f"got {shown(choice)}", 'Send {"type": "function", "function": {"name": ...}}.')
        return chosen_tool(name, tools, param), tools
    return _mode(None if isinstance(choice, UnsetType) else choice, tools, param), tools


def _mode(choice: str | None, tools: list[dict[str, Any]], param: str) -> str:
    if choice is None:
        return "auto"
    if choice not in ("auto", "none", "required"):
        raise bad(param, f"got {shown(choice)}", "Known are auto, none, required, and a tool by its name.")
    if choice == "required" and not tools:
        raise bad(param, "required, and there are no tools", "Send tools.")
    return choice


def _among_allowed(
    choice: dict[str, Any], tools: list[dict[str, Any]]
) -> tuple[str | dict[str, str], list[dict[str, Any]]]:
    """{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}: some of the tools only."""
    param, allowed = "tool_choice.allowed_tools", choice.get("allowed_tools", choice)
    listed = allowed.get("tools") if isinstance(allowed, dict) else None
    if not isinstance(listed, list):
        raise bad(param, f"got {shown(allowed)}", 'Send {"mode": "auto", "tools": [...]}.')
    names = set()
    for i, one in enumerate(listed):
        function = one.get("function", one) if isinstance(one, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise bad(f"{param}.tools[{i}]", f"got {shown(one)}", "Send the tool's name.")
        names.add(chosen_tool(name, tools, f"{param}.tools[{i}]")["name"])
    mode = allowed.get("mode")
    if mode is not None and not isinstance(mode, str):
        raise bad(f"{param}.mode", f"got {shown(mode)}", "Known are auto and required.")
    left = [tool for tool in tools if decoding.name_of(tool) in names]
    return _mode(mode, left, f"{param}.mode"), left
