"""What the scripted model says to the programs that are tried with it: it knows the weather, and makes files.

A prompt is looked at as a model sees it, so that a server which loses a tool, a result or a thought gets another
answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

THOUGHT = "I should think first: 想一想."
WARM = {"city": "杭州", "degrees": 21}
FILE = "made.txt"
COMMAND = f"echo hello > {FILE} && cat {FILE}"
MADE = "The file is made."
# The tools that make a file in a shell, by their names in the agents, with the arguments that they take.
SHELLS: dict[str, dict[str, Any]] = {
    "Bash": {"command": COMMAND, "description": "make the file"},
    "exec_command": {"cmd": COMMAND},
    "shell_command": {"command": COMMAND},
    "shell": {"command": ["bash", "-lc", COMMAND]},
    "run_shell_command": {"command": COMMAND, "description": "make the file", "is_background": False},
}
_TOOLS = re.compile(r"<tools>\n(.*?)\n</tools>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)


@dataclass(frozen=True)
class Seen:
    """A prompt of Qwen3's template: the user's ``words`` at its end or the ``results`` there, tools, and thoughts."""

    words: str
    results: list[str]
    tools: dict[str, dict[str, Any]]
    thinks: bool

    @classmethod
    def of(cls, prompt: str) -> Seen:
        listed = _TOOLS.search(prompt)
        tools = [json.loads(line) for line in listed[1].splitlines()] if listed else []
        last = prompt.rsplit("<|im_start|>user\n", 1)[-1].partition("<|im_end|>")[0]
        return cls(
            last,
            _RESULT.findall(last),
            {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools},
            not prompt.endswith("</think>\n\n"),
        )


def assistant(prompt: str) -> str:
    """The answer of a hybrid Qwen3 to a prompt, its thought included where it may think."""
    seen = Seen.of(prompt)
    return (f"<think>\n{THOUGHT}\n</think>\n\n" if seen.thinks else "") + _answer(seen)


def _answer(seen: Seen) -> str:
    shell = next((name for name in SHELLS if name in seen.tools), None)
    if seen.results:
        return MADE if shell else "They say: " + "; ".join(seen.results)
    if shell and "file" in seen.words:
        return "I make it.\n" + _call(shell, SHELLS[shell])
    if "weather" in seen.words.lower() and (
        name := next((tool for tool in seen.tools if "weather" in tool), None)
    ):
        cities = ["杭州", "Paris"] if "杭州 and Paris" in seen.words else ["杭州"]
        calls = [_call(name, _arguments(seen.tools[name], city)) for city in cities]
        return "I look.\n" + "\n".join(calls)
    if "JSON" in seen.words:
        for name, schema in seen.tools.items():  # a structure may be asked for as a tool
            if set(WARM) <= set(schema.get("properties", ())):
                return _call(name, WARM)
        return json.dumps(WARM, ensure_ascii=False)
    if "five words" in seen.words or "title" in seen.words:  # an agent wants a name for the conversation
        return json.dumps({"title": "A file is made"})
    if seen.words.startswith("Something long"):
        return "word " * 2000
    return f"You said: {seen.words}"


def react(prompt: str) -> str:
    """The answer of a Qwen-1 to a prompt in the ReAct form, whoever put it there; it goes on beyond its call, as that
    model does where nothing stops it."""
    _, observed, after = prompt.rpartition("\nObservation: ")
    if observed and after.endswith("\nThought:"):
        return (
            f" I now know the final answer.\nFinal Answer: They say: {after.removesuffix('Thought:').strip()}"
        )
    if "Begin!" in prompt:
        arguments = json.dumps({"city": "杭州"}, ensure_ascii=False)
        return f"Thought: I look.\nAction: weather\nAction Input: {arguments}\nObservation: snow\nThought: never seen"
    return f"You said: {Seen.of(prompt).words}"


def _arguments(schema: dict[str, Any], text: str) -> dict[str, Any]:
    """What a schema requires, every text being ``text``."""
    made = {}
    for name in schema.get("required", ()):
        field = schema["properties"][name]
        made[name] = field["enum"][0] if "enum" in field else {"string": text}.get(field.get("type"), 21)
    return made


def _call(name: str, arguments: dict[str, Any]) -> str:
    return (
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    )
