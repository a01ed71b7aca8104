"""What every chat format makes of a conversation."""

from __future__ import annotations

from dataclasses import dataclass

from qwenrt.arguments import as_integer
from qwenrt.errors import RequestError, shown


@dataclass(frozen=True)
class Prompt:
    """What to feed the model and how to read its answer.

    ``stop``: strings that end the answer because of the prompt's form (ReAct's "Observation:").
    ``in_thought``: whether the prompt itself ends inside a thought (an open <think>, ReAct's "Thought:").
    ``thought_over``: whether it ends behind one, or within an answer, so that none is to come.
    """

    token_ids: list[int]
    stop: tuple[str, ...] = ()
    in_thought: bool = False
    thought_over: bool = False


def check_window(window: object) -> int | None:
    """A max_window_size as it may be given: a number of tokens, or None."""
    tokens = as_integer(window)
    if window is None or (tokens is not None and tokens >= 0):
        return tokens
    raise RequestError("max_window_size", f"got {shown(window)}", "Pass a number of tokens, or None.")
