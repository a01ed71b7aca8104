"""Answers of Qwen-1 with tools, token by token as the engine reads them: whole and as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.answering import Prepared, ReplyReader, generation_of
from qwenrt.engine.output_processor import OutputProcessor, StopRules
from qwenrt.engine.sequence import Sequence as Completion
from qwenrt.outputs import Delta, Generation
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.replies.parser import REACT, ReplyStream
from qwenrt.text.tokenizer.tokenizer import Tokenizer
from tests.text.replies.test_react import PARTS
from tests.text.small_vocab import small_ranks

TOKENIZER = Tokenizer(small_ranks(), name="small")


class Written(Iterator[Delta]):
    """A request whose tokens are known: those of a text, then the end of the turn."""

    def __init__(self, text: str, params: SamplingParams, reply: ReplyStream) -> None:
        self._tokens = [*TOKENIZER.encode(text), TOKENIZER.im_end_id]
        self._seq = Completion(0, [1], params)
        rules = StopRules(frozenset([TOKENIZER.im_end_id]))
        self._processor = OutputProcessor(self._seq, rules, TOKENIZER, True, reply)
        self.replies = [reply]
        self._done = False

    def __next__(self) -> Delta:
        if self._done:
            raise StopIteration
        token = self._tokens.pop(0)
        self._seq.token_ids.append(token)
        delta = self._processor.push(token, None)
        self._done = delta.finish_reason is not None
        return delta


def answer(text: str, **sampling: Any) -> tuple[Written, ReplyReader]:
    prepared = Prepared([1], SamplingParams(**sampling), ReplyReader(REACT), ("Observation:",))
    params, options = prepared.options(TOKENIZER)
    assert options["thought"] is None
    return Written(text, params, options["replies"][0]), prepared.reader


def both(text: str, **sampling: Any) -> tuple[Generation, list[Delta]]:
    written, reader = answer(text, **sampling)
    whole, deltas = generation_of(written, reader, written.replies), list(answer(text, **sampling)[0])
    assert deltas[-1].finish_reason == whole.finish_reason
    functions = [call["function"] for call in whole.message.get("tool_calls", [])]
    assert [call["function"] for call in deltas[-1].tool_calls or []] == functions
    pieces = [piece for delta in deltas for piece in delta.calls]
    assert [piece.name for piece in pieces if piece.name] == [function["name"] for function in functions]
    assert "".join(piece.arguments for piece in pieces) == "".join(f["arguments"] for f in functions)
    assert deltas[-1].broken_calls == whole.broken_calls
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    return whole, deltas


CALL = 'Thought: t\nAction: f\nAction Input: {"q": 1}\n'


@pytest.mark.parametrize(
    ("text", "shown", "content", "arguments"),
    [
        (CALL + "Observation: made up", "t", "t", '{"q": 1}'),
        ("Let me see.\nAction Input: x\n" + CALL, "Let me see.\nAction Input: x", "t", '{"q": 1}'),
        ("Thought: t\nAction: f\nAction Input:", "t", "t", "{}"),
        ("Thought: t\nAction: f\nAction Input: plain words", "t", "t", "plain words"),
        ('Thought: t\nAction: f\nAction Input: {"q": ', "t", "t", '{"q":'),
        ("Thought: t\nFinal Answer: 42", "42", "42", None),
        ("hello", "hello", "hello", None),
    ],
)
def test_whole_and_streamed_calls_agree(text: str, shown: str, content: str, arguments: str | None) -> None:
    whole, deltas = both(text)
    assert whole.text == text.partition("Observation:")[0]
    assert "".join(delta.text for delta in deltas) == shown
    assert whole.message["content"] == content
    assert whole.finish_reason == ("stop" if arguments is None else "tool_calls")
    if arguments is not None:
        assert whole.message["tool_calls"][0]["function"] == {"name": "f", "arguments": arguments}


def test_a_call_that_max_tokens_cut_off_is_unfinished() -> None:
    length = len(TOKENIZER.encode(CALL))
    ends, arguments = set(), set()
    for limit in range(1, length + 1):
        whole, _ = both(CALL, max_tokens=limit)
        calls = whole.message.get("tool_calls", [])
        if whole.finish_reason == "length" and calls:
            arguments.add(calls[0]["function"]["arguments"])
            assert whole.message["content"] == "t" and whole.broken_calls == 1
        elif whole.finish_reason == "length":
            assert whole.message["content"] == whole.text and whole.broken_calls == 0
        else:
            assert calls[0]["function"]["arguments"] == '{"q": 1}' and whole.broken_calls == 0
        ends.add(whole.finish_reason)
    assert ends == {"length", "tool_calls"}
    assert arguments and all('{"q": 1'.startswith(begun) for begun in arguments)


@settings(deadline=None, max_examples=100)
@given(PARTS, st.integers(1, 60))
def test_any_text_and_any_length(parts: list[str], limit: int) -> None:
    whole, _ = both("".join(parts), max_tokens=limit)
    assert whole.finish_reason in ("stop", "length", "tool_calls")
    assert (whole.finish_reason == "tool_calls") is ("tool_calls" in whole.message and not whole.broken_calls)


def test_a_stop_of_the_caller_cuts_the_one_text_of_react() -> None:
    whole, _ = both("Thought: the Question\nFinal Answer: 1", stop=["Question"])
    assert (whole.text, whole.finish_reason) == ("Thought: the ", "stop")
