"""Calls in the Deltas of a completion whose tokens are known: bytes, so that characters come in halves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.engine.output_processor import OutputProcessor, StopRules
from qwenrt.engine.sequence import Sequence
from qwenrt.outputs import Delta
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.replies.parser import REACT, ReplyStream, parse_reply
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.tokenizer.tokenizer import Tokenizer
from tests.text.small_vocab import small_ranks

TOKENIZER = Tokenizer(small_ranks(), name="small")
HERMES, XML = ReplyFormat("hermes", "hybrid"), ReplyFormat("xml", "none")
TEXTS = {
    "hermes": '<think>\n看\n</think>\n\n好。\n<tool_call>\n{"name": "找", "arguments": {"q": "你好😀\\ud83d\\ude00", '
    '"n": [1, 2.50]}}\n</tool_call>',
    "xml": "好。\n<function=找>\n<parameter=q>\n你好😀\n\n</parameter>\n<parameter=n>\n 3 \n</parameter>\n</function>",
    "react": 'Thought: 好\nAction: 找\nAction Input: {"q": "你好😀"}\n',
}
ARGUMENTS = {
    "hermes": '{"q": "你好😀😀", "n": [1, 2.5]}',
    "xml": '{"q": "你好😀\\n", "n": 3}',
    "react": '{"q": "你好😀"}',
}
STYLES = {"hermes": HERMES, "xml": XML, "react": REACT}
TOOLS = [{"name": "找", "parameters": {"properties": {"n": {"type": "integer"}}}}]


def written(text: str, style: ReplyFormat, single_call: bool = False, **sampling: Any) -> list[Delta]:
    """The Deltas of an answer that is this text, if nothing ends it before."""
    params = SamplingParams(**sampling)
    seq = Sequence(0, [1], params)
    reply = ReplyStream(style, tools=TOOLS, single_call=single_call)
    processor = OutputProcessor(seq, StopRules(frozenset([TOKENIZER.im_end_id])), TOKENIZER, True, reply)
    deltas: list[Delta] = []
    for token in [*TOKENIZER.encode(text), TOKENIZER.im_end_id]:
        seq.token_ids.append(token)
        deltas.append(processor.push(token, None))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def streamed(deltas: list[Delta]) -> list[list[str]]:
    """Each call's name and arguments, out of the pieces; the same as the whole calls of the last Delta."""
    calls: list[list[str]] = []
    ids: list[str] = []
    for piece in (piece for delta in deltas for piece in delta.calls):
        if piece.name:
            assert piece.index == len(calls) and piece.id
            calls.append([piece.name, ""])
            ids.append(piece.id)
        calls[piece.index][1] += piece.arguments
    whole = deltas[-1].tool_calls or []
    assert [[call["function"]["name"], call["function"]["arguments"]] for call in whole] == calls
    assert [call["id"] for call in whole] == ids
    assert all(delta.tool_calls is None for delta in deltas[:-1])
    return calls


@pytest.mark.parametrize("form", list(TEXTS))
def test_the_arguments_come_as_they_are_written(form: str) -> None:
    deltas = written(TEXTS[form], STYLES[form])
    assert streamed(deltas) == [["找", ARGUMENTS[form]]]
    assert (deltas[-1].finish_reason, deltas[-1].broken_calls) == ("tool_calls", 0)
    told = [delta for delta in deltas if any(piece.arguments for piece in delta.calls)]
    assert len(told) >= 8, "they came in few pieces"
    assert sum(map(len, (piece.arguments for piece in deltas[-1].calls))) <= 1, "they waited for the end"


@pytest.mark.parametrize("form", list(TEXTS))
def test_max_tokens_in_a_call_leaves_its_beginning(form: str) -> None:
    ends = set()
    for limit in range(1, len(TOKENIZER.encode(TEXTS[form])) + 1):
        deltas = written(TEXTS[form], STYLES[form], max_tokens=limit)
        calls = streamed(deltas)
        assert all(ARGUMENTS[form].startswith(arguments.rstrip("\ufffd")) for _, arguments in calls)
        whole = [arguments for _, arguments in calls] == [ARGUMENTS[form]]
        assert deltas[-1].finish_reason == ("tool_calls" if whole else "length")
        assert deltas[-1].broken_calls == int(bool(calls) and not whole) or not calls
        ends.add((len(calls), whole))
    assert ends == {(0, False), (1, False), (1, True)}


def test_a_single_call_ends_the_completion() -> None:
    text = TEXTS["hermes"] + "\nmore" + TEXTS["hermes"]
    assert len(streamed(written(text, HERMES))) == 2
    deltas = written(text, HERMES, single_call=True)
    assert streamed(deltas) == [["找", ARGUMENTS["hermes"]]] and deltas[-1].finish_reason == "tool_calls"
    assert "more" not in "".join(delta.text for delta in deltas)
    assert len([token for delta in deltas for token in delta.token_ids]) == len(
        TOKENIZER.encode(TEXTS["hermes"])
    )


def test_a_broken_call_is_counted_and_nothing_fails() -> None:
    for text, calls in (("<tool_call>{x</tool_call>", 0), ('<tool_call>{"name": "f", "arguments": {x', 1)):
        deltas = written(text, HERMES)
        assert (deltas[-1].finish_reason, deltas[-1].broken_calls, len(streamed(deltas))) == (
            "stop",
            1,
            calls,
        )


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(list(TEXTS)),
    st.integers(0, 200),
    st.sampled_from(["", '"', "}", "\n", "</tool_call>", "世", "\nObservation:"]),
    st.integers(1, 300),
)
def test_any_answer_is_what_its_text_means(form: str, at: int, put: str, limit: int) -> None:
    text = TEXTS[form][:at] + put + TEXTS[form][at:]
    deltas = written(text, STYLES[form], max_tokens=limit)
    calls = streamed(deltas)
    if limit > len(TOKENIZER.encode(text)):
        whole = parse_reply(text, STYLES[form], tools=TOOLS)
        assert [
            [call["function"]["name"], call["function"]["arguments"]] for call in whole.tool_calls
        ] == calls
        assert deltas[-1].broken_calls == whole.broken_calls
        assert deltas[-1].finish_reason == whole.finish_reason("stop")
