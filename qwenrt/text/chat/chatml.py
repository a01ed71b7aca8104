"""ChatML prompts as token ids: turns, history trimming, messages, stop ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenrt.arguments import as_integer
from qwenrt.errors import RequestError, shown
from qwenrt.text.chat.conversations import as_history
from qwenrt.text.chat.react import DEFAULT_SYSTEM as DEFAULT_SYSTEM
from qwenrt.text.chat.react import Turns, parse_messages

if TYPE_CHECKING:
    from qwenrt.text.tokenizer.tokenizer import Tokenizer

OBSERVATION_STOP = "Observation:"  # the model would go on and make up the tool's result
THOUGHT = "Thought:"


@dataclass(frozen=True)
class Prompt:
    """What to feed the model and how to read its answer.

    ``stop``: strings that end the answer because of the prompt's form (ReAct's "Observation:").
    ``is_continuation``: the answer continues the last assistant message instead of beginning one.
    ``dropped_turns``: how many of the oldest turns did not fit max_window_size.
    ``thinking``: whether the answer begins inside a thought or may begin with one.
    ``in_thought``: whether the prompt itself ends inside a thought (an open <think>, ReAct's "Thought:").
    """

    token_ids: list[int]
    stop: tuple[str, ...] = ()
    is_continuation: bool = False
    dropped_turns: int = 0
    thinking: bool = False
    in_thought: bool = False


def build_chat(
    tokenizer: Tokenizer,
    query: str,
    history: object = None,
    system: str = DEFAULT_SYSTEM,
    max_window_size: int | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of one chat prompt. Texts go in as they are: not stripped, never parsed for control tokens.

    ``history``: (user, assistant) pairs or alternating messages, oldest first. The newest turns are kept, as
    many as have, with the system block, fewer than ``max_window_size`` tokens (None keeps all); the query is
    not counted.
    """
    _require_text("query", query)
    return _render(
        tokenizer, Turns(system, as_history(history), query), max_window_size, add_generation_prompt
    ).token_ids


def build_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_window_size: int | None = None,
    add_generation_prompt: bool = True,
) -> Prompt:
    """The prompt for OpenAI-shaped messages, with ``tools`` in the ReAct form that Qwen-1 was trained on.

    Messages that end with an assistant or tool message are continued (with ``add_generation_prompt`` off they
    are closed instead). Raises RequestError for anything a chat cannot be built from.
    """
    turns = parse_messages(messages, tools)
    prompt = _render(tokenizer, turns, max_window_size, add_generation_prompt)
    in_thought = turns.query is None and turns.history[-1][1].endswith(THOUGHT) and add_generation_prompt
    return replace(prompt, stop=(OBSERVATION_STOP,) if tools else (), in_thought=in_thought)


def build_raw(tokenizer: Tokenizer, text: str, allow_special: bool = False) -> list[int]:
    """The prompt of a base model ("raw" chat format): the text itself."""
    return tokenizer.encode(text, allow_special=allow_special)


def stop_ids(tokenizer: Tokenizer, chat_format: str | None) -> list[list[int]]:
    """The id sequences that end an answer in a chat format: "chatml", "raw" or None for no format.

    A raw model has no turns; it is stopped where it would start to play the human.
    """
    if chat_format == "chatml":
        start, end = tokenizer.turn_ids()
        return [[end], [start]]
    if chat_format in ("raw", None):
        return [tokenizer.encode("Human:"), [tokenizer.eod_id]]
    raise RequestError(f"chat format {chat_format!r:.80}", "unknown", "Known are: 'chatml', 'raw'.")


def check_window(window: object) -> int | None:
    """A max_window_size as it may be given: a number of tokens, or None."""
    tokens = as_integer(window)
    if window is None or (tokens is not None and tokens >= 0):
        return tokens
    raise RequestError("max_window_size", f"got {shown(window)}", "Pass a number of tokens, or None.")


def _render(
    tokenizer: Tokenizer, turns: Turns, max_window_size: int | None, add_generation_prompt: bool
) -> Prompt:
    """Each piece is encoded by itself: a newline of the template never merges with one of the content."""
    window = check_window(max_window_size)
    encode, newline = tokenizer.encode, tokenizer.encode("\n")
    start, end = ([token_id] for token_id in tokenizer.turn_ids())
    user = [*newline, *start, *encode("user"), *newline]
    assistant = [*newline, *start, *encode("assistant"), *newline]
    _require_text("system", turns.system)
    head = [*start, *encode("system"), *newline, *encode(turns.system), *end]
    pairs = list(turns.history)

    def turn(pair: tuple[str, str]) -> list[int]:
        return [*user, *encode(pair[0]), *end, *assistant, *encode(pair[1]), *end]

    is_continuation = turns.query is None
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
        ids = turn(pair)
        if window is not None and size + len(ids) >= window:
            break
        kept.append(ids)
        size += len(ids)
    middle = [i for ids in reversed(kept) for i in ids]
    return Prompt([*head, *middle, *tail], (), is_continuation, len(pairs) - len(kept))


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(name, f"got {type(value).__name__}", "Pass a str.")
