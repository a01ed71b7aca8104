"""What the released checkpoints are asked: the same words where answers are recorded and where they are checked."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]

SYSTEM = "You are a helpful assistant. Answer in one short sentence."
CODES = 300  # of the long conversation's list


def code_of(room: int) -> int:
    """A number of four digits that nobody can guess from the room's."""
    return 1000 + room * 7919 % 9000


def _rooms(first: int, last: int) -> str:
    return "\n".join(f"Room {room} has code {code_of(room)}." for room in range(first, last))


ASKED_ROOM = 137
LONG: list[Message] = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "Here is the first part of a list of rooms.\n" + _rooms(1, CODES // 2)},
    {"role": "assistant", "content": "I have read the first part."},
    {"role": "user", "content": "Here is the rest of it.\n" + _rooms(CODES // 2, CODES + 1)},
    {"role": "assistant", "content": "I have read the whole list."},
    {"role": "user", "content": f"Which code does room {ASKED_ROOM} have?"},
]
CHATS: dict[str, list[Message]] = {
    "english": [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    "chinese": [{"role": "user", "content": "请用一句话介绍一下长城。"}],
    "turns": [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "Write a Python function that greets me by my name."},
    ],
    "long": LONG,
}
# Control tokens are parsed here; in a chat they are text.
TEXTS = {
    "completion": "def fibonacci(n):\n    ",
    "middle": "<|fim_prefix|>def area(width, height):\n    return <|fim_suffix|>\n\nprint(area(3, 4))\n<|fim_middle|>",
}
NEW_TOKENS = 24
