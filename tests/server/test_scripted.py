"""The scripted model: what it writes is what the script says, by whatever way the engine computes it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from qwenrt.errors import QwenrtError
from tests.server.asking import Gate
from tests.server.scripted import scripted_llm

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = 'It is:\n<tool_call>\n{"name": "weather", "arguments": {"city": "杭州"}}\n</tool_call>'
FORMS = {
    "qwen3": f"<think>\nhm\n</think>\n\n{CALL}",
    "thinking": f"hm\n</think>\n\n{CALL}",
    "xml": "It is:\n<tool_call>\n<function=weather>\n<parameter=city>\n杭州\n</parameter>\n</function>\n</tool_call>",
    "qwen1": 'hm\nAction: weather\nAction Input: {"city": "杭州"}\nObservation:',
}


def asked(prompt: str) -> str:
    """An answer that tells two prompts apart."""
    return f"you said {prompt.rsplit('<|im_start|>user', 1)[-1].split('<|im_end|>')[0].strip()!r}"


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with scripted_llm(asked, max_model_len=4096, max_num_seqs=4) as loaded:
        yield loaded


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("chat", FORMS)
def test_calls_in_every_form(chat: str) -> None:
    with scripted_llm(lambda prompt: FORMS[chat], max_model_len=4096, chat=chat) as loaded:
        answer = loaded.chat(messages=user("Is it warm?"), tools=[WEATHER])
    assert answer.finish_reason == "tool_calls"
    [call] = answer.message["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "杭州"}


def test_the_react_form_written_by_hand_is_an_answer_like_any_other() -> None:
    written = [*user("Begin!\n\nQuestion: q"), {"role": "assistant", "content": "Observation: 21\nThought:"}]
    said = " I now know the final answer.\nFinal Answer: 21"
    with scripted_llm(lambda prompt: said, max_model_len=512, chat="qwen1") as loaded:
        answer = loaded.chat(messages=written, stop=["Observation:"])
    assert answer.text == said and not answer.reasoning


def test_a_window_of_64k_is_the_default_and_long_prompts_are_read() -> None:
    seen: list[str] = []

    def reply(prompt: str) -> str:
        seen.append(prompt)
        return "read"

    text = "a long description of many tools, and what they are for; " * 2500
    with scripted_llm(reply, max_num_batched_tokens=8192) as loaded:
        assert loaded.stats()["max_model_len"] == 65536
        answer = loaded.chat(messages=user(text))
        assert answer.text == "read" and answer.usage.prompt_tokens > 30_000
        again = loaded.chat(messages=[*user(text), answer.message, *user("and now?")])
        assert again.usage.cached_tokens > 0.99 * answer.usage.prompt_tokens
    assert [text in prompt for prompt in seen] == [True, True] and "and now?" in seen[1]


def test_a_conversation_grows_and_its_beginning_is_found_again(llm: qwenrt.LLM) -> None:
    messages = user("first " * 40)
    for turn in range(4):
        answer = llm.chat(messages=messages, temperature=1.0, seed=turn)
        said = messages[-1]["content"].strip()
        assert answer.text == f"you said {said!r}"
        messages = [*messages, answer.message, *user(f"turn {turn}")]
    assert llm.chat(messages=messages).usage.cached_tokens > 64


def test_many_at_once_do_not_mix() -> None:
    with scripted_llm(asked, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=48) as loaded:
        answers: dict[int, str] = {}

        def one(number: int) -> None:
            answers[number] = loaded.chat(messages=user(f"number {number} of many " * (1 + number % 5))).text

        threads = [threading.Thread(target=one, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(24):
        assert answers[number] == f"you said {(f'number {number} of many ' * (1 + number % 5)).strip()!r}"


def test_answers_that_are_preempted_go_on() -> None:
    def reply(prompt: str) -> str:
        return asked(prompt) + " word" * 150

    with scripted_llm(reply, max_model_len=512, max_num_seqs=4) as loaded:
        gate = Gate(loaded)
        blank = gate.engine.blocks._blank
        held = [blank.pop() for _ in range(len(blank) - 30)]
        with gate.closed():  # all four are there before the first has gone far
            handles = [loaded.stream(messages=user(f"number {n}")) for n in range(4)]
        texts = ["" for _ in handles]
        done = threading.Barrier(5)

        def read(index: int) -> None:
            texts[index] = "".join(delta.text for delta in handles[index])
            done.wait()

        for index in range(4):
            threading.Thread(target=read, args=(index,), daemon=True).start()
        done.wait(timeout=60)
        assert loaded.stats()["preemptions"] > 0
        blank += held
    assert texts == [f"you said 'number {n}'" + " word" * 150 for n in range(4)]


def test_logprobs_penalties_and_several_choices_are_the_hosts(llm: qwenrt.LLM) -> None:
    answer = llm.chat(messages=user("x"), logprobs=2, repetition_penalty=1.1, n=2, temperature=0.5)
    assert [choice.text for choice in answer.choices] == ["you said 'x'"] * 2
    assert answer.logprobs is not None and answer.logprobs[0].logprob > -1e-3


def test_a_limit_cuts_and_a_script_that_fails_is_an_error(llm: qwenrt.LLM) -> None:
    assert llm.chat(messages=user("a text"), max_tokens=2).finish_reason == "length"

    def reply(prompt: str) -> str:
        raise ValueError("no script")

    with scripted_llm(reply, max_model_len=512) as loaded, pytest.raises(QwenrtError):
        loaded.chat(messages=user("x"))


def test_a_script_within_a_grammar_is_written_as_it_is() -> None:
    pytest.importorskip("llguidance")
    said = '{"city": "杭州", "warm": true}'
    with scripted_llm(lambda prompt: said, max_model_len=512) as loaded:
        for temperature in (0.0, 1.0):
            answer = loaded.chat(
                messages=user("x"), grammar=qwenrt.Grammar.json_object(), temperature=temperature, seed=1
            )
            assert answer.text == said and answer.finish_reason == "stop"


def test_a_script_outside_of_a_grammar_ends_where_it_may() -> None:
    pytest.importorskip("llguidance")
    with scripted_llm(lambda prompt: "no", max_model_len=512) as loaded:
        answer = loaded.chat(
            messages=user("x"), grammar=qwenrt.Grammar.choice(["yes", "never"]), temperature=0
        )
        assert answer.text in ("yes", "never")
        assert loaded.chat(messages=user("x"), temperature=0).text == "no"


def test_a_beginning_is_found_again_after_a_restart(tmp_path: Path) -> None:
    system = {"role": "system", "content": "You are an agent with many tools. " * 60}

    def opened() -> qwenrt.LLM:
        return scripted_llm(asked, max_model_len=4096, prefix_store=tmp_path)

    def written(loaded: qwenrt.LLM) -> int:
        return int(loaded.stats()["stored_blocks_written"])

    with opened() as first:
        usages = [first.chat(messages=[system, *user(text)]).usage for text in ("a", "b", "c")]
        shared = usages[-1].cached_tokens // first.stats()["block_size"]
        deadline = time.monotonic() + 60
        while written(first) < shared and time.monotonic() < deadline:
            time.sleep(0.01)
        assert written(first) >= shared > 30
    with opened() as second:
        answer = second.chat(messages=[system, *user("d")])
    assert answer.text == "you said 'd'" and answer.usage.cached_tokens == usages[-1].cached_tokens
