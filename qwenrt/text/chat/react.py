"""Checked messages as Qwen-1's turns; tools, calls and results in the ReAct form it knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwenrt.errors import RequestError
from qwenrt.text.chat.messages import Call, Message, check_messages, check_tools, out_of_place, unmatched

DEFAULT_SYSTEM = "You are a helpful assistant."
REACT_INSTRUCTION = """Answer the following questions as best you can. You have access to the following APIs:

{tools_text}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{tools_name_text}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""
_TOOL = (
    "{name_for_model}: Call this tool to interact with the {name_for_human} API. "
    "What is the {name_for_human} API useful for? {description_for_model} Parameters: {parameters}"
)
_FINAL_ANSWER = "Thought: I now know the final answer.\nFinal Answer: "


@dataclass(frozen=True)
class Turns:
    """A conversation as Qwen-1 was trained on it: a system text and pairs of user and assistant.

    ``query`` is the user text to answer, or None where the last pair's assistant text is to be continued.
    """

    system: str
    history: list[tuple[str, str]]
    query: str | None


def parse_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> Turns:
    """OpenAI-shaped messages as turns; calls, results and ``tools`` become ReAct text inside them."""
    checked = [_normalized(f"messages[{i}]", m) for i, m in enumerate(check_messages(messages))]
    if not any(m.role == "user" for m in checked):
        raise _invalid("Expecting at least one user message", "Add a message with role 'user'.")
    system = DEFAULT_SYSTEM
    if checked[0].role == "system":
        system = checked.pop(0).text
    turns = _alternating(_sequential(checked), bool(tools))
    query = turns.pop()[1] if turns[-1][0] == "user" else None
    if len(turns) % 2:
        raise RequestError(
            "Invalid request",
            f"{len(turns)} messages before the last user message do not pair up",
            "User and assistant messages must alternate.",
        )
    history = []
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        if (user[0], assistant[0]) != ("user", "assistant"):
            raise _invalid(
                "Expecting exactly one user (or function) role before every assistant role",
                "User and assistant messages must alternate.",
            )
        history.append((user[1], assistant[1].rstrip()))
    if tools:
        instruction = react_instruction(tools) + "\n\nQuestion: "
        # In front of the last *answered* question where there is one: odd, but so does the published code of Qwen-1.
        if history:
            history[-1] = (instruction + history[-1][0], history[-1][1])
        else:
            query = instruction + (query or "")
    return Turns(system, history, query)


def react_instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """The text that tells the model which tools it has and in what form to call them."""
    specs = _tool_specs(tools)
    return REACT_INSTRUCTION.format(
        tools_text="\n\n".join(_TOOL.format(**spec) for spec in specs),
        tools_name_text=", ".join(spec["name_for_model"] for spec in specs),
    )


def _normalized(where: str, message: Message) -> Message:
    """The message as Qwen-1 was trained on it: white space at the ends removed, arguments as JSON text."""
    calls = tuple(
        Call(call.name, call.arguments, call.id)
        if isinstance(call.arguments, str)
        else Call(call.name, _json(f"{where}: arguments of {call.name!r:.80}", call.arguments), call.id)
        for call in message.calls
    )
    return replace(message, text=message.text.lstrip("\n").rstrip(), calls=calls)


def _sequential(messages: Sequence[Message]) -> list[Message]:
    """Several calls in one message become one call after another, each followed by its own result.

    The ReAct form knows one call at a time. Results are matched by tool_call_id, else by order.
    """
    ordered: list[Message] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        if len(message.calls) < 2:
            ordered.append(message)
            continue
        results = []
        while index < len(messages) and messages[index].role in ("tool", "function"):
            results.append(messages[index])
            index += 1
        for number, call in enumerate(message.calls):
            ordered.append(Message("assistant", "" if number else message.text, (call,)))
            for result in results:
                if result.tool_call_id is None or result.tool_call_id == call.id:
                    ordered.append(result)
                    results.remove(result)
                    break
        if results:
            raise unmatched(results[0], len(message.calls))
    return ordered


def _alternating(messages: Sequence[Message], with_tools: bool) -> list[tuple[str, str]]:
    """(role, text) of user and assistant only: calls and results are written into the assistant's text."""
    turns: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        role, text = message.role, message.text
        if role == "user":
            turns.append((role, text))
        elif role == "system":
            raise _invalid("Incorrect role system", "Only the first message may have it.")
        elif role == "assistant":
            if not turns:
                raise _invalid("Expecting role user before role assistant", "Begin with a user message.")
            text = _assistant_text(message, with_tools)
            if turns[-1][0] == "user":
                turns.append((role, text.lstrip("\n").rstrip()))
            else:
                turns[-1] = (role, f"{turns[-1][1]}\n{text}")
        else:
            if not turns or turns[-1][0] != "assistant":
                raise out_of_place(role)
            text = f"{turns[-1][1]}\nObservation: {text}"
            if index == len(messages) - 1:
                text += "\nThought:"
            turns[-1] = ("assistant", text)
    return turns


def _assistant_text(message: Message, with_tools: bool) -> str:
    text = message.text
    if not message.calls:
        return _FINAL_ANSWER + text if with_tools else text
    if not text.startswith("Thought:"):
        text = f"Thought: {text}"
    call = message.calls[0]
    return f"{text}\nAction: {call.name}\nAction Input: {call.arguments}"


def _tool_specs(tools: object) -> list[dict[str, str]]:
    """Tools as OpenAI wraps them, as bare functions, or with Qwen's own name_for_model keys."""
    specs = []
    for index, tool in enumerate(check_tools(tools)):
        where = f"tools[{index}]"
        spec = {
            "name_for_model": _text_of(where, tool, "name_for_model", "name"),
            "name_for_human": _text_of(where, tool, "name_for_human", "name"),
            "description_for_model": _text_of(where, tool, "description_for_model", "description"),
        }
        parameters = tool.get("parameters")
        if parameters is None:  # as OpenAI reads it: a function without parameters
            parameters = {"type": "object", "properties": {}}
        spec["parameters"] = _json(f"{where}: parameters", parameters)
        specs.append(spec)
    return specs


def _text_of(where: str, tool: Mapping[str, Any], *keys: str) -> str:
    """The first text under one of ``keys`` that is not empty; empty where there is none."""
    for key in keys:
        value = tool.get(key)
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{where}: {key}", f"got {type(value).__name__}", "Pass a str.")
        if value:
            return value
    return ""


def _json(where: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(where, str(error)[:120], "It must be expressible as JSON.") from error


def _invalid(found: str, remedy: str) -> RequestError:
    return RequestError("Invalid request", found, remedy)
