"""What is asked: the same for a seed, of the sizes that were named, growing at its end."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from qwenrt.errors import RequestError
from qwenrt.load_test.pacing import ClosedLoop, OpenLoop
from qwenrt.load_test.workloads import TOOLS, WORKLOADS, Conversation, Request, conversations


def requests(conversation: Conversation, **answer: Any) -> Iterator[Request]:
    """All requests of a conversation, each answered."""
    while (request := conversation.ask()) is not None:
        yield request
        conversation.heard(**answer or {"text": "an answer"})


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_says_what_is_asked(name: str) -> None:
    def asked(seed: int) -> list[Request]:
        made = conversations(WORKLOADS[name].changed(range_ratio=0.5), 7, seed)
        return [request for conversation in made for request in requests(conversation)]

    assert len(asked(1)) == 7 and asked(1) == asked(1) != asked(2)


@pytest.mark.parametrize("name", WORKLOADS)
def test_questions_never_begin_alike_so_that_no_cache_has_them(name: str) -> None:
    made = conversations(WORKLOADS[name], 12, 0)
    said = [turn.text for conversation in made for turn in conversation.turns]
    assert len({text[:8] for text in said}) == len(said)
    assert {len(text.split()) for text in said} == {WORKLOADS[name].prompt_words + 1}


def test_prefixes_are_shared_or_not() -> None:
    def prefixes(count: int) -> set[str]:
        made = conversations(WORKLOADS["shared-prefix"].changed(prefixes=count, prefix_words=9), 20, 0)
        return {conversation.messages[0]["content"] for conversation in made}

    assert len(prefixes(1)) == 1 and len(prefixes(3)) == 3 and len(prefixes(0)) == 20
    assert {len(prefix.split()) for prefix in prefixes(0)} == {9}
    (conversation,) = conversations(WORKLOADS["random"], 1, 0)
    assert conversation.messages == []


def test_sizes_vary_as_the_ratio_says() -> None:
    made = conversations(
        WORKLOADS["random"].changed(prompt_words=100, new_tokens=10, range_ratio=0.3), 300, 0
    )
    words = [len(conversation.turns[0].text.split()) - 1 for conversation in made]
    tokens = [conversation.turns[0].new_tokens for conversation in made]
    assert (min(words), max(words)) == (70, 130) and (min(tokens), max(tokens)) == (7, 13)
    assert 95 < statistics.mean(words) < 105


@pytest.mark.parametrize("name", ["chat", "agent"])
def test_a_prompt_grows_at_its_end(name: str) -> None:
    (conversation,) = conversations(WORKLOADS[name], WORKLOADS[name].turns, 0)
    asked = list(requests(conversation, text="so it is", reasoning="hm"))
    assert len(asked) == WORKLOADS[name].turns
    for before, after in itertools.pairwise(asked):
        assert after.messages[: len(before.messages)] == before.messages
        assert after.prompt.startswith(before.prompt + " so it is\n")
        answer = after.messages[len(before.messages)]
        assert (answer["role"], answer["content"], answer["reasoning_content"]) == (
            "assistant",
            "so it is",
            "hm",
        )


def test_an_agent_s_results_answer_its_calls() -> None:
    (conversation,) = conversations(WORKLOADS["agent"].changed(turns=3), 3, 0)
    first = conversation.ask()
    assert first is not None and first.tools == TOOLS
    calls = [
        {"id": f"x{i}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in (1, 2)
    ]
    conversation.heard("", calls=calls)
    second = conversation.ask()
    assert second is not None
    assert [m["tool_call_id"] for m in second.messages if m["role"] == "tool"] == ["x1", "x2"]
    conversation.heard("no call this time")
    third = conversation.ask()
    assert third is not None
    made = third.messages[-2]["tool_calls"][0]
    assert made["function"]["name"] == "read_file" and third.messages[-1]["tool_call_id"] == made["id"]
    assert conversation.ask() is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt_words": 0}, "--prompt-words: got 0. It must be at least 1."),
        ({"turns": -1}, "--turns: got -1"),
        ({"range_ratio": 1.0}, "--range-ratio: got 1.0"),
    ],
)
def test_sizes_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as error:
        WORKLOADS["chat"].changed(**given)
    assert said in str(error.value)


def test_a_seed_says_when() -> None:
    loop = OpenLoop(rate=4, burstiness=1.0, seed=3)
    assert loop.starts(50) == loop.starts(50) != OpenLoop(4, 1.0, 4).starts(50)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_spread_that_burstiness_says(burstiness: float) -> None:
    starts = OpenLoop(rate=10, burstiness=burstiness, seed=1).starts(20000)
    gaps = [after - before for before, after in zip([0.0, *starts], starts)]
    assert starts == sorted(starts) and starts[-1] == pytest.approx(2000)
    assert statistics.mean(gaps) == pytest.approx(0.1)
    assert statistics.stdev(gaps) / 0.1 == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)


def test_a_metronome_and_conversations_of_several_turns() -> None:
    assert OpenLoop(2, math.inf).starts(3) == pytest.approx([0.5, 1.0, 1.5])
    assert OpenLoop(2, math.inf).starts(2, requests_each=4) == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ClosedLoop(0), "--concurrency: got 0"),
        (lambda: OpenLoop(0.0), "--request-rate: got 0.0"),
        (lambda: OpenLoop(math.inf), "--request-rate: got inf"),
        (lambda: OpenLoop(math.nan), "--request-rate: got nan"),
        (lambda: OpenLoop(1.0, -1), "--burstiness: got -1"),
    ],
)
def test_paces_that_make_no_sense(make: Any, said: str) -> None:
    with pytest.raises(RequestError) as error:
        make()
    assert said in str(error.value)
