"""What is asked: conversations made of random words, the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwenrt.errors import RequestError

_TEXT = """
river stone garden window paper silver morning engine letter mountain table winter summer yellow orange
water forest bridge market doctor teacher number point light sound heart house street music story road field
ship train north south island village city king child mother father friend night dinner kitchen office bank
gold iron glass wood fire wind rain snow cloud star moon earth ocean beach horse bird fish tree flower apple
bread
"""
WORDS = tuple(_TEXT.split())  # one token each in the vocabularies of Qwen, behind a space
Message = dict[str, Any]

TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": about,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string"}},
                "required": [argument],
            },
        },
    }
    for name, about, argument in (
        ("read_file", "Returns the text of a file.", "path"),
        ("list_directory", "Returns the names in a directory.", "path"),
        ("run_command", "Runs a command and returns what it prints.", "command"),
    )
)


@dataclass(frozen=True)
class Workload:
    """Sizes of what is asked. Words are about as many tokens; the server's count is what figures use.

    ``prompt_words``: of each question; of an agent, of what each tool returns. ``prefix_words``: of the system prompt.
    ``prefixes``: how many different ones there are, 0: one for each conversation. ``turns``: of a conversation.
    ``new_tokens``: of each answer. ``range_ratio``: r draws each number of words and tokens between (1 - r) and (1 + r)
    times the above.
    """

    name: str
    about: str
    prompt_words: int
    new_tokens: int
    prefix_words: int = 0
    prefixes: int = 1
    turns: int = 1
    range_ratio: float = 0.0

    def __post_init__(self) -> None:
        lowest = {"prompt_words": 1, "new_tokens": 1, "prefix_words": 0, "prefixes": 0, "turns": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                option = "--" + name.replace("_", "-")
                raise RequestError(option, f"got {getattr(self, name)}", f"It must be at least {low}.")
        if not 0 <= self.range_ratio < 1:
            raise RequestError("--range-ratio", f"got {self.range_ratio}", "It must be from 0 to below 1.")

    def changed(self, **given: Any) -> Workload:
        """With what is not None in place of the workload's own."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("chat", "conversations of several turns that begin alike", 64, 64, prefix_words=32, turns=4),
        Workload("shared-prefix", "one question each, behind a long system prompt", 64, 64, prefix_words=512),
        Workload("random", "one question each, all different", 256, 64),
        Workload(
            "agent",
            "a task, then results of tools: a long prompt that grows at its end",
            *(200, 64),
            prefix_words=500,
            turns=6,
        ),
    )
}


@dataclass(frozen=True)
class Request:
    """One request for a chat: the messages so far and the most tokens of the answer."""

    messages: Sequence[Message]
    new_tokens: int
    tools: Sequence[dict[str, Any]] = ()

    @property
    def prompt(self) -> str:
        """The messages as one text, for servers' completions: each prompt of a conversation begins the next."""
        lines = [f"{message['role']}: {message.get('content') or ''}\n" for message in self.messages]
        return "".join(lines) + "assistant:"


@dataclass(frozen=True)
class Turn:
    """What is said before an answer: a question of the user, or what a tool returned."""

    role: str
    text: str
    new_tokens: int


@dataclass
class Conversation:
    """One conversation. What the server answered is part of the next prompt, as with people and agents."""

    turns: Sequence[Turn]
    messages: list[Message] = field(default_factory=list)
    tools: Sequence[dict[str, Any]] = ()
    _asked: int = 0

    def ask(self) -> Request | None:
        """The next request, None after the last turn."""
        if self._asked == len(self.turns):
            return None
        turn = self.turns[self._asked]
        self._asked += 1
        if turn.role == "tool":
            self._returned(turn.text)
        else:
            self.messages.append({"role": turn.role, "content": turn.text})
        return Request(tuple(self.messages), turn.new_tokens, self.tools)

    def heard(self, text: str, reasoning: str = "", calls: Sequence[dict[str, Any]] = ()) -> None:
        """The answer to the last request, ``calls`` as OpenAI's messages have them."""
        said: Message = {"role": "assistant", "content": text}
        if reasoning:  # a server that sends thoughts apart takes them back so
            said["reasoning_content"] = reasoning
        if calls:
            said["tool_calls"] = list(calls)
        self.messages.append(said)

    def _returned(self, text: str) -> None:
        """The results of all calls of the last answer. A random model makes none; then one is made for it, behind what
        it wrote, so that the prompt still only grows at its end."""
        answer = self.messages[-1]
        if "tool_calls" not in answer:
            arguments = json.dumps({"path": f"notes/{self._asked}.txt"})
            call = {"name": "read_file", "arguments": arguments}
            answer["tool_calls"] = [{"id": f"call_{self._asked}", "type": "function", "function": call}]
        for number, call in enumerate(answer["tool_calls"]):
            content = text if number == 0 else "done"
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})


def conversations(workload: Workload, requests: int, seed: int) -> list[Conversation]:
    """Conversations with ``requests`` turns in all; the last may have fewer than the others."""
    if requests < 1:
        raise RequestError("--num-prompts", f"got {requests}", "It must be at least 1.")
    source = random.Random(f"{workload.name} {seed}")
    prefixes = [_words(source, workload.prefix_words) for _ in range(workload.prefixes)]
    made, left = [], requests
    while left:
        turns = min(workload.turns, left)
        left -= turns
        made.append(_conversation(workload, source, prefixes, turns))
    return made


def _conversation(
    workload: Workload, source: random.Random, prefixes: Sequence[str], turns: int
) -> Conversation:
    agent = workload.name == "agent"
    later = "tool" if agent else "user"
    roles = ["user"] + [later] * (turns - 1)
    # A number in front: no two questions share their beginning, so no cache helps where none should.
    texts = [
        f"{source.getrandbits(32):08x}{_words(source, _size(source, workload, 'prompt_words'))}"
        for _ in roles
    ]
    said = [
        Turn(role, text, _size(source, workload, "new_tokens"))
        for role, text in zip(roles, texts, strict=True)
    ]
    prefix = source.choice(prefixes) if prefixes else _words(source, workload.prefix_words)
    opening = [{"role": "system", "content": prefix.strip()}] if prefix else []
    return Conversation(said, opening, TOOLS if agent else ())


def _size(source: random.Random, workload: Workload, name: str) -> int:
    middle, ratio = getattr(workload, name), workload.range_ratio
    return max(1, source.randint(round(middle * (1 - ratio)), round(middle * (1 + ratio))))


def _words(source: random.Random, count: int) -> str:
    return "".join(f" {source.choice(WORDS)}" for _ in range(count))
