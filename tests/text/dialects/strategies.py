"""What the dialects are fuzzed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qwenrt.outputs import CallDelta, Delta, FinishReason, Generation, Timing, Usage
from qwenrt.text.replies.reply import Reply

# The first text of a process costs seconds: Hypothesis makes its table of all characters.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)

TEXT = st.text(max_size=30)
REASONS = st.sampled_from(get_args(FinishReason))


@dataclass(frozen=True)
class Written:
    """The same answers twice: as pieces in some order, and whole."""

    deltas: list[Delta]
    choices: list[Generation]


@st.composite
def written(draw: st.DrawFn, choices: int = 3, calls: int = 2) -> Written:
    """Up to ``choices`` answers, cut anywhere, their pieces interleaved."""
    count = draw(st.integers(1, choices))
    queues, whole = [], []
    for index in range(count):
        deltas, generation = draw(_answer(index, calls))
        queues.append(deltas)
        whole.append(generation)
    mixed = []
    while any(queues):
        open_ones = [queue for queue in queues if queue]
        mixed.append(draw(st.sampled_from(open_ones)).pop(0))
    return Written(mixed, whole)


@st.composite
def _answer(draw: st.DrawFn, index: int, most_calls: int) -> tuple[list[Delta], Generation]:
    thought, content = draw(TEXT), draw(TEXT)
    called = draw(
        st.lists(st.tuples(st.sampled_from(["get", "查询", "<|im_end|>"]), TEXT), max_size=most_calls)
    )
    calls = [
        {"id": f"call_{index}_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(called)
    ]
    reason = "tool_calls" if calls else draw(REASONS.filter(lambda reason: reason != "tool_calls"))
    usage = Usage(7, draw(st.integers(0, 50)), 4, 1)
    timing = Timing(0.25, 0.5, 1.5, 20.0)
    pieces = [Delta("", [1], reasoning=piece, index=index) for piece in cut(draw, thought)]
    pieces += [Delta(piece, [2, 3], index=index) for piece in cut(draw, content)]
    for i, (name, arguments) in enumerate(called):
        first, *rest = cut(draw, arguments) or [""]
        pieces.append(Delta("", index=index, calls=(CallDelta(i, calls[i]["id"], name, first),)))
        pieces += [Delta("", [4], index=index, calls=(CallDelta(i, arguments=piece),)) for piece in rest]
    pieces.append(Delta("", [5], reason, index, None, usage, calls or None, timing=timing))
    message = Reply(content, thought, calls).message()
    return pieces, Generation(content, [], reason, usage, message=message, reasoning=thought, timing=timing)


def cut(draw: st.DrawFn, text: str) -> list[str]:
    """A text in pieces, some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
