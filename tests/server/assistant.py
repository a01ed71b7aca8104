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
    tools: list[str]
    thinks: bool

    @classmethod
    def of(cls, prompt: str) -> Seen:
        listed = _TOOLS.search(prompt)
        tools = [json.loads(line) for line in listed[1].splitlines()] if listed else []
        last = prompt.rsplit("<|im_start|>user\n", 1)[-1].partition("<|im_end|>")[0]
        return cls(
            last,
            _RESULT.findall(last),
            [tool["function"]["name"] for tool in tools],
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
    if "weather" in seen.words and "weather" in seen.tools:
        cities = ["杭州", "Paris"] if "Paris" in seen.words else ["杭州"]
        return "I look.\n" + "\n".join(_call("weather", {"city": city}) for city in cities)
    if "JSON" in seen.words:
        return json.dumps(WARM, ensure_ascii=False)
    if "long" in seen.words:
        return "word " * 2000
    return f"You said: {seen.words}"


def _call(name: str, arguments: dict[str, Any]) -> str:
    return (
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    )
