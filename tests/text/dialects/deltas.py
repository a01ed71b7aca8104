"""Answers in random pieces, and the same as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from qwenrt.answering import generation_of
from qwenrt.outputs import CallDelta, Delta, FinishReason, Generation, Timing, TokenLogprob, Usage

REASONS: tuple[FinishReason, ...] = ("stop", "length", "tool_calls", "timeout", "abort")
TEXT = st.text(max_size=6)
ARGUMENTS = st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=3)


def _cut(text: str, places: Sequence[int]) -> list[str]:
    cuts = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def stream(draw: Any, index: int = 0, broken: bool = False) -> list[Delta]:
    """The pieces of one choice: thought, then text and calls in pieces. broken: arguments need be no JSON."""
    cuts = st.lists(st.integers(0, 1000), max_size=4)
    logprobs = draw(st.booleans())
    pieces = [Delta("", [1], reasoning=piece) for piece in _cut(draw(TEXT), draw(cuts))]
    pieces += [Delta(piece, [2, 3]) for piece in _cut(draw(st.text(max_size=30)), draw(cuts))]
    calls = []
    for number in range(draw(st.integers(0, 3))):
        arguments = draw(TEXT) if broken and draw(st.booleans()) else json.dumps(draw(ARGUMENTS))
        call_id, name = f"call_{index}{number}", f"tool{number}"
        function = {"name": name, "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})
        first, *rest = _cut(arguments, draw(cuts))
        pieces.append(Delta("", [4], calls=(CallDelta(number, call_id, name, first),)))
        pieces += [Delta("", [5], calls=(CallDelta(number, arguments=piece),)) for piece in rest]
        if draw(st.booleans()):
            pieces.append(Delta(draw(TEXT), [6]))
    usage = Usage(7, sum(len(piece.token_ids) for piece in pieces) + 1, 2, draw(st.integers(0, 3)))
    pieces.append(
        Delta(
            draw(TEXT),
            [9],
            draw(st.sampled_from(REASONS)),
            usage=usage,
            tool_calls=calls or None,
            timing=Timing(0.25, 0.5, 2.0, 10.0),
        )
    )
    return [
        Delta(
            **{
                **vars(piece),
                "index": index,
                "logprobs": [TokenLogprob(i, -0.5, {i: -0.5}) for i in piece.token_ids] if logprobs else None,
            }
        )
        for piece in pieces
    ]


def disorder() -> st.SearchStrategy[list[Delta]]:
    """Pieces in an order that no reader of answers gives: a stream is one whatever came."""
    call = st.builds(
        CallDelta, st.integers(0, 3), st.sampled_from(["", "call_1"]), st.sampled_from(["", "f"]), TEXT
    )
    piece = st.builds(
        Delta,
        TEXT,
        st.just([1]),
        reasoning=TEXT,
        calls=st.lists(call, max_size=3).map(tuple),
        usage=st.just(Usage(3, 2)),
    )
    return st.lists(piece, max_size=8)


def joined(deltas: Sequence[Delta]) -> list[Generation]:
    """The whole choices that these pieces are of, in their order."""
    whole = generation_of(deltas)
    made = whole.choices or (whole,)
    last = {delta.index: delta for delta in deltas}
    timed = [Generation(**{**vars(one), "timing": last[i].timing}) for i, one in enumerate(made)]
    return timed


def mixed(streams: Sequence[Sequence[Delta]], order: Sequence[int]) -> list[Delta]:
    """The pieces of several choices as they come: each in its own order."""
    left = [list(one) for one in streams]
    pieces = []
    for turn in order:
        waiting = [one for one in left if one]
        if waiting:
            pieces.append(waiting[turn % len(waiting)].pop(0))
    return pieces + [piece for one in left for piece in one]


def token_text(token: int) -> tuple[str, bytes]:
    return f"<{token}>", bytes([token])
