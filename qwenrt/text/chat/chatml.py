"""Qwen-1's ChatML prompts as token ids: turns, and which of the oldest are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qwenrt.errors import RequestError
from qwenrt.text.chat.conversations import as_history
from qwenrt.text.chat.prompt import Prompt, check_window
from qwenrt.text.chat.react import DEFAULT_SYSTEM, Turns, parse_messages
from qwenrt.text.tokenizer.overlong import Overlong

if TYPE_CHECKING:
    from qwenrt.text.tokenizer.tokenizer import Tokenizer

OBSERVATION_STOP = "Observation:"  # the model would go on and make up the tool's result
THOUGHT = "Thought:"


def build_chat(
    tokenizer: Tokenizer,
    query: str,
    history: object = None,
    system: str = DEFAULT_SYSTEM,
    max_window_size: int | None = None,
    add_generation_prompt: bool = True,
    most: int | None = None,
) -> list[int]:
    """The ids of one chat prompt. Texts go in as they are: not stripped, never parsed for control tokens.

    ``history``: (user, assistant) pairs or alternating messages, oldest first. The newest turns are kept, as
    many as have, with the system block, fewer than ``max_window_size`` tokens (None keeps all); the query is
    not counted. ``most``: as `Tokenizer.encode` has it, of each text that is kept.
    """
    _require_text("query", query)
    turns = Turns(system, as_history(history), query)
    return _render(tokenizer, turns, max_window_size, add_generation_prompt, most).token_ids


def build_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_window_size: int | None = None,
    add_generation_prompt: bool = True,
    most: int | None = None,
) -> Prompt:
    """The prompt for OpenAI-shaped messages, with ``tools`` in the ReAct form that Qwen-1 was trained on.

    Messages that end with an assistant or tool message are continued (with ``add_generation_prompt`` off they
    are closed instead). Where a caller writes the form himself there are no tools, and what follows his "Thought:" is
    an answer like any other. Raises RequestError for anything a chat cannot be built from.
    """
    turns = parse_messages(messages, tools)
    prompt = _render(tokenizer, turns, max_window_size, add_generation_prompt, most)
    continued = turns.query is None and add_generation_prompt
    return replace(
        prompt,
        stop=(OBSERVATION_STOP,) if tools else (),
        in_thought=bool(tools) and continued and turns.history[-1][1].endswith(THOUGHT),
    )


def _render(
    tokenizer: Tokenizer,
    turns: Turns,
    max_window_size: int | None,
    add_generation_prompt: bool,
    most: int | None,
) -> Prompt:
    """Each piece is encoded by itself: a newline of the template never merges with one of the content."""
    window = check_window(max_window_size)
    encode, newline = partial(tokenizer.encode, most=most and max(most, window or 0)), tokenizer.encode("\n")
    start, end = ([token_id] for token_id in tokenizer.turn_ids())
    user = [*newline, *start, *encode("user"), *newline]
    assistant = [*newline, *start, *encode("assistant"), *newline]
    _require_text("system", turns.system)
    head = [*start, *encode("system"), *newline, *encode(turns.system), *end]
    pairs = list(turns.history)

    def turn(pair: tuple[str, str]) -> list[int]:
        return [*user, *encode(pair[0]), *end, *assistant, *encode(pair[1]), *end]

    if turns.query is None:
        tail = turn(pairs.pop())
        if add_generation_prompt:
            tail.pop()  # the final <|im_end|>: the answer goes on from here
    else:
        tail = [*user, *encode(turns.query), *end]
        if add_generation_prompt:
            tail += assistant
    kept: list[list[int]] = []
    size = len(head)
    for pair in reversed(pairs):
        try:
            ids = turn(pair)
        except Overlong:
            if window is None:
                raise
            break
        if window is not None and size + len(ids) >= window:
            break
        kept.append(ids)
        size += len(ids)
    middle = [i for ids in reversed(kept) for i in ids]
    return Prompt([*head, *middle, *tail])


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(name, f"got {type(value).__name__}", "Pass a str.")
