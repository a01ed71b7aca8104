"""What three agents send in five turns of one task, in the shapes that were recorded from them, with words made here.

The task: find a bug, fix it, be asked for a test. The answers are those of `ANSWERS`, unless others are given in the
form in which the client got them. Sizes are an agent's: `claude_code` about 85 kB, `codex` 40 kB, `qwen_code` 67 kB.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwenrt.text.dialects.signed_thoughts import SignedThoughts

THOUGHTS = SignedThoughts(b"the key of these tests")


@dataclass(frozen=True)
class Answer:
    """What a model writes in one turn: its thought, what it says, and its calls as (name, arguments)."""

    thought: str
    said: str
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()


ANSWERS = (
    Answer(
        "I should look at the file first.", "I'll read it.", (("Read", {"path": "src/sum.py", "limit": 200}),)
    ),
    Answer(
        'The loop starts at 1.\nIt should start at 0: "range(1, n)" drops the first.',
        "The first element is left out.",
        (
            ("Edit", {"path": "src/sum.py", "old": "range(1, n)", "new": "range(n)", "all": False}),
            ("Bash", {"command": "python -m pytest -q | tail -3", "timeout": 60.5}),
        ),
    ),
    Answer("Fixed. One more look at 测试.", "", (("Bash", {"command": "git diff --stat && echo '完成'"}),)),
    Answer("All is done.", "`total` now counts the first element too.\n\nThe tests pass."),
)
# What comes before each answer: the user's words, or the results of the calls.
QUESTIONS = {0: "total([1, 2]) gives 2. Please fix it.", 4: "Now add a test for it."}
RESULTS = {
    1: ("def total(xs):\n    n = len(xs)\n    return sum(xs[i] for i in range(1, n))\n",),
    2: ("The file was changed.", "3 passed in 0.02s"),
    3: (" src/sum.py | 2 +-\n1 file changed\n完成",),
}
REMINDER = "<system-reminder>\nThe list of tasks is empty.\n</system-reminder>"
TURNS = 5
_TOOLS = (
    "Read Edit Bash Write Glob Grep Fetch Search Task Plan Notebook List Kill Output Todo Ask Skill Remember Watch "
    "Move Copy Delete Format Lint Test"
)
_NAMES = _TOOLS.split()
_WORDS = "the a file tool path line of to is must with when not only each result model user before after"


def prose(seed: object, size: int) -> str:
    """A text of about ``size`` characters, the same for the same seed."""
    words = _WORDS.split()
    pick, text = random.Random(str(seed)), ""
    while len(text) < size:
        sentence = " ".join(pick.choice(words) for _ in range(pick.randint(6, 14)))
        text += sentence.capitalize() + pick.choice((". ", ".\n", ".\n\n- "))
    return text[:size]


def schema(name: str, size: int) -> dict[str, Any]:
    """The parameters of one of the agents' tools."""
    known = {"path": "string", "command": "string", "old": "string", "new": "string", "limit": "integer"}
    properties: dict[str, Any] = {
        key: {"type": kind, "description": prose((name, key), size)} for key, kind in known.items()
    }
    properties["all"] = {"type": "boolean", "default": False}
    properties["timeout"] = {"type": "number", "description": prose((name, "timeout"), size)}
    return {"type": "object", "properties": properties, "required": ["path"], "additionalProperties": False}


def call_ids(turn: int) -> list[str]:
    """The ids of the calls in the answer of a turn."""
    return [f"call_{turn}{number}" for number in range(len(ANSWERS[turn].calls))]


# ---- Claude Code: /v1/messages


def claude_blocks(turn: int) -> list[dict[str, Any]]:
    """The answer of a turn as blocks."""
    answer = ANSWERS[turn]
    signature = THOUGHTS.signature(answer.thought)
    blocks: list[dict[str, Any]] = [{"type": "thinking", "thinking": answer.thought, "signature": signature}]
    if answer.said:
        blocks.append({"type": "text", "text": answer.said})
    for call_id, (name, arguments) in zip(call_ids(turn), answer.calls, strict=True):
        blocks.append({"type": "tool_use", "id": call_id, "name": name, "input": arguments})
    return blocks


def claude_code(
    turn: int, answers: Sequence[list[dict[str, Any]]] | None = None, session: int = 1
) -> dict[str, Any]:
    """The body of turn 0 to 4. answers: the blocks of the answers before it. session: changes what a session changes,
    but for the user's words."""
    messages: list[dict[str, Any]] = []
    for step in range(turn + 1):
        messages += _claude_step(step, answers, is_last=step == turn)
    billing = (
        f"x-anthropic-billing-header: cc_version=2.1.197.{session:03x}; cc_entrypoint=cli; cch={session:05x};"
    )
    system = [
        {"type": "text", "text": billing},
        {"type": "text", "text": "You work in a terminal, for somebody who writes programs.", **_CACHE},
        {
            "type": "text",
            "text": prose("claude", 12000) + "\nFolder: /srv/sums\nToday: 2026-11-30",
            **_CACHE,
        },
    ]
    tools = [
        {"name": name, "description": prose(name, 1250), "input_schema": schema(name, 180)} for name in _NAMES
    ]
    return {
        "model": "claude-opus-4-8",
        "max_tokens": 32000,
        "stream": True,
        "system": system,
        "messages": messages,
        "tools": tools,
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": f"user_{session:064x}_session_{session}"},
    }


_CACHE = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def _claude_step(
    step: int, answers: Sequence[list[dict[str, Any]]] | None, is_last: bool
) -> list[dict[str, Any]]:
    """An answer, and what the client says to it. The newest message alone is marked for the cache."""
    before: list[dict[str, Any]] = []
    if step:
        blocks = answers[step - 1] if answers is not None else claude_blocks(step - 1)
        before = [{"role": "assistant", "content": blocks}]
    mark = _CACHE if is_last else {}
    if step in QUESTIONS:
        content: Any = [{"type": "text", "text": QUESTIONS[step], **mark}]
        if step == 0:
            content.insert(0, {"type": "text", "text": REMINDER})
        elif not is_last:
            content = QUESTIONS[step]
        system = (
            [{"role": "system", "content": "The user's editor is open at src/sum.py."}] if step == 0 else []
        )
        return [*before, {"role": "user", "content": content}, *system]
    ids = [block["id"] for block in before[0]["content"] if block["type"] == "tool_use"]
    results: list[dict[str, Any]] = [
        {"type": "tool_result", "tool_use_id": call_id, "content": _content(step, text), "is_error": False}
        for call_id, text in zip(ids, RESULTS[step], strict=False)
    ]
    if step == 2:
        results.append({"type": "text", "text": REMINDER})
    results[-1] |= mark
    return [*before, {"role": "user", "content": results}]


def _content(step: int, text: str) -> Any:
    """The client sends some results as text, and some as blocks."""
    return text if step == 1 else [{"type": "text", "text": text}]


def claude_code_title(session: int = 1) -> dict[str, Any]:
    """The side request for a title, which goes out beside the first turn."""
    schema = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    return {
        "model": "claude-haiku-4-5",
        "max_tokens": 512,
        "stream": True,
        "system": [{"type": "text", "text": "Name this conversation in five words."}],
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
    }


# ---- Codex: /v1/responses


def codex_items(turn: int) -> list[dict[str, Any]]:
    """The answer of a turn as items."""
    answer = ANSWERS[turn]
    packed = THOUGHTS.packed(answer.thought)
    items: list[dict[str, Any]] = [
        {"type": "reasoning", "id": f"rs_{turn}", "summary": [], "content": None, "encrypted_content": packed}
    ]
    if answer.said:
        content = [{"type": "output_text", "text": answer.said}]
        items.append({"type": "message", "id": f"msg_{turn}", "role": "assistant", "content": content})
    for call_id, (name, arguments) in zip(call_ids(turn), answer.calls, strict=True):
        written = json.dumps(arguments, ensure_ascii=False)
        items.append({"type": "function_call", "name": name, "arguments": written, "call_id": call_id})
    return items


def codex(
    turn: int, answers: Sequence[list[dict[str, Any]]] | None = None, session: int = 1
) -> dict[str, Any]:
    """The body of turn 0 to 4. answers: the items of the answers before it."""
    items: list[dict[str, Any]] = [
        {"type": "message", "role": "developer", "content": [_input(prose("codex", 14000))]},
        {"type": "message", "role": "developer", "content": [_input(prose("skills", 3000))]},
        {"type": "message", "role": "user", "content": [_input("# AGENTS.md\n\n" + prose("agents", 1500))]},
        {
            "type": "message",
            "role": "user",
            "content": [_input("<environment_context>\n  <cwd>/srv/sums</cwd>\n</environment_context>")],
        },
    ]
    for step in range(turn + 1):
        before = []
        if step:
            before = list(answers[step - 1]) if answers is not None else codex_items(step - 1)
        items += before
        if step in QUESTIONS:
            items.append({"type": "message", "role": "user", "content": [_input(QUESTIONS[step])]})
            continue
        calls = [item for item in before if item["type"].endswith("_call")]
        for call, text in zip(calls, RESULTS[step], strict=False):
            kind = call["type"] + "_output"
            items.append({"type": kind, "call_id": call["call_id"], "output": text})
    tools: list[dict[str, Any]] = [
        {
            "type": "function",
            "name": name,
            "description": prose(name, 500),
            "strict": False,
            "parameters": schema(name, 120),
        }
        for name in _NAMES[:9]
    ]
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" LF'}
    tools += [
        {"type": "custom", "name": "apply_patch", "description": prose("patch", 200), "format": grammar},
        {"type": "web_search", "external_web_access": False},
        {
            "type": "namespace",
            "name": "mcp__notes",
            "description": "Notes.",
            "tools": [tools[0] | {"name": "find"}],
        },
    ]
    return {
        "model": "gpt-5.3-codex",
        "input": items,
        "tools": tools,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "high", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": f"session-{session}",
        "text": {"verbosity": "low"},
        "client_metadata": {"session": str(session)},
    }


def _input(text: str) -> dict[str, Any]:
    return {"type": "input_text", "text": text}


# ---- Qwen Code: /v1/chat/completions


def qwen_message(turn: int) -> dict[str, Any]:
    """The answer of a turn as a message."""
    answer = ANSWERS[turn]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.said or None,
        "reasoning_content": answer.thought,
    }
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": call_id,
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for call_id, (name, arguments) in zip(call_ids(turn), answer.calls, strict=True)
        ]
    return message


def qwen_code(turn: int, answers: Sequence[dict[str, Any]] | None = None, session: int = 1) -> dict[str, Any]:
    """The body of turn 0 to 4. answers: the messages of the answers before it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": prose("qwen", 30000)}]
    for step in range(turn + 1):
        before: dict[str, Any] = {}
        if step:
            before = answers[step - 1] if answers is not None else qwen_message(step - 1)
            messages.append(before)
        if step in QUESTIONS:
            messages.append({"role": "user", "content": QUESTIONS[step]})
            continue
        for call, text in zip(before["tool_calls"], RESULTS[step], strict=False):
            parts = [{"type": "text", "text": text}]
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": parts})
    tools = [
        {
            "type": "function",
            "function": {"name": name, "description": prose(name, 1200), "parameters": schema(name, 260)},
        }
        for name in _NAMES[:11]
    ]
    return {
        "model": "qwen3-coder-plus",
        "messages": messages,
        "tools": tools,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 8000,
        "temperature": 0,
        "metadata": {"sessionId": str(session), "promptId": f"{session}-{turn}"},
    }
