"""achat, astream and agenerate: what their counterparts say, from an event loop that goes on meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from qwenrt.answering import Prepared
from qwenrt.errors import RequestError
from tests.model.parrot import IN_THOUGHT, parrot
from tests.model.tiny_models import load

QUIET = {"temperature": 0, "max_tokens": 12}
ENDLESS = {"temperature": 0, "max_tokens": None, "ignore_eos": True}
HELLO = [{"role": "user", "content": "hello"}]
SAID = ["The Question", ": is what", "</think>", "\n\n", "It is 42."]


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with qwenrt.load("demo", max_model_len=2048, max_num_seqs=4) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[qwenrt.LLM]:
    with load(parrot(tmp_path_factory.mktemp("thinker"), SAID, IN_THOUGHT)) as loaded:
        yield loaded


async def rested(llm: qwenrt.LLM) -> None:
    """Once nothing is left in the engine; a test that waits for ever is ended by its own limit."""
    while (stats := llm.stats())["running"] or stats["waiting"] or stats["pending"]:
        await asyncio.sleep(0.001)


def test_the_three_say_what_their_counterparts_say(llm: qwenrt.LLM) -> None:
    async def main() -> None:
        assert await llm.achat("hello", [("a", "b")], **QUIET) == llm.chat("hello", [("a", "b")], **QUIET)
        whole, awaited = llm.chat(messages=HELLO, **QUIET), await llm.achat(messages=HELLO, **QUIET)
        assert (awaited.text, awaited.token_ids) == (whole.text, whole.token_ids)
        assert awaited.usage.completion_tokens == whole.usage.completion_tokens
        streamed = [delta async for delta in llm.astream("hello", **QUIET)]
        assert "".join(d.text for d in streamed) == "".join(d.text for d in llm.stream("hello", **QUIET))
        assert streamed[-1].usage is not None and streamed[-1].timing is not None
        single = await llm.agenerate("The capital of", **QUIET)
        assert single.text == llm.generate("The capital of", **QUIET).text
        several = await llm.agenerate(["The", "A"], n=2, **QUIET)
        expected = llm.generate(["The", "A"], n=2, **QUIET)
        assert [[c.text for c in g.choices] for g in several] == [
            [c.text for c in g.choices] for g in expected
        ]
        by_ids = await llm.agenerate(prompt_token_ids=[5, 6], **QUIET)
        assert by_ids.token_ids == llm.generate(prompt_token_ids=[5, 6], **QUIET).token_ids

    asyncio.run(main())


def test_calls_of_qwen1_are_read_as_well(llm: qwenrt.LLM) -> None:
    tools = [{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]
    whole = llm.chat(messages=HELLO, tools=tools, **QUIET)
    awaited = asyncio.run(llm.achat(messages=HELLO, tools=tools, **QUIET))
    assert (awaited.text, awaited.message["content"]) == (whole.text, whole.message["content"])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: m.achat(), "neither a query nor messages"),
        (lambda m: m.achat("q", n=2), "n=2"),
        (lambda m: m.achat("q", thinking_budget=3), "this model does not think"),
        (lambda m: m.achat(messages=HELLO, temprature=1), "'temprature': unknown"),
        (lambda m: m.astream(prompt_token_ids=[1], messages=HELLO).__anext__(), "beside a chat"),
        (lambda m: m.agenerate(["a"], [qwenrt.SamplingParams()] * 2), "2 for 1 prompts"),
        (lambda m: m.agenerate(prompt_token_ids=[[1, 2], [9999]]), "prompt token id 9999"),
    ],
)
def test_bad_calls_are_explained(llm: qwenrt.LLM, ask: Callable[[Any], Any], message: str) -> None:
    async def main() -> None:
        with pytest.raises(RequestError, match=message):
            await ask(llm)
        await rested(llm)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["achat", "astream", "agenerate"])
def test_a_cancelled_task_ends_the_work(llm: qwenrt.LLM, kind: str) -> None:
    async def stream() -> None:
        async for _ in llm.astream("hello", **ENDLESS):
            pass

    async def main() -> None:
        before = llm.stats()["cancelled"]
        asks = {
            "achat": lambda: llm.achat("hello", **ENDLESS),
            "astream": stream,
            "agenerate": lambda: llm.agenerate(["a", "b"], **ENDLESS),
        }
        task = asyncio.create_task(asks[kind]())
        while not llm.stats()["running"]:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await rested(llm)
        assert llm.stats()["cancelled"] == before + (2 if kind == "agenerate" else 1)

    asyncio.run(main())


def test_a_stream_that_is_left_ends_the_work(llm: qwenrt.LLM) -> None:
    async def main() -> None:
        stream = llm.astream("hello", **ENDLESS)
        async for _ in stream:
            break
        await stream.aclose()
        await rested(llm)
        async for _ in llm.astream("hello", **ENDLESS):  # the loop's own hook closes it
            break
        await rested(llm)

    asyncio.run(main())


def test_the_loop_goes_on_while_a_prompt_is_made(llm: qwenrt.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompter = type(llm._prompter)
    right, makers = prompter.chat_prompt, []
    release = threading.Event()

    def slow(*args: Any) -> Any:
        makers.append(threading.current_thread())
        assert release.wait(200)
        return right(*args)

    monkeypatch.setattr(prompter, "chat_prompt", slow)

    async def main() -> None:
        task = asyncio.create_task(llm.achat("hello", **QUIET))
        while not makers:
            await asyncio.sleep(0.001)
        assert not task.done() and makers[0] is not threading.current_thread()
        release.set()  # which this loop could not do if it waited for the prompt
        await task

    asyncio.run(main())


def test_what_is_prepared_is_data_until_it_is_submitted(llm: qwenrt.LLM) -> None:
    before = llm.stats()["generated_tokens"]
    prepared = llm.prepare(messages=HELLO, **QUIET)
    assert isinstance(prepared, Prepared) and len(prepared.prompt_token_ids) > 5
    assert (
        llm.prepare(prompt="a", **QUIET).prompt_token_ids
        == llm.prepare(prompt_token_ids=[97]).prompt_token_ids
    )
    assert llm.stats()["generated_tokens"] == before
    texts = {"".join(delta.text for delta in llm.submit(prepared)) for _ in range(2)}
    assert texts == {llm.chat(messages=HELLO, **QUIET).text}
    with pytest.raises(RequestError, match="prompt beside a chat"):
        llm.prepare("hello", prompt="a")
    with pytest.raises(RequestError, match="prompt: got list"):
        llm.prepare(prompt=["a"])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no event loop"):
        llm.asubmit(prepared)


def test_budgets_hold_for_several_answers_and_count_as_reasoning(thinker: qwenrt.LLM) -> None:
    async def main() -> None:
        whole = await thinker.achat(messages=HELLO, temperature=0, thinking_budget=1, n=2)
        for choice in whole.choices:
            assert choice.reasoning.startswith("The Question\n\nConsidering the limited time by the user")
            assert choice.text == "It is 42."
        free = await thinker.achat(messages=HELLO, temperature=0)
        assert (free.text, free.usage.reasoning_tokens) == ("It is 42.", 3)

    asyncio.run(main())


def test_the_model_can_be_told_to_stop_thinking(thinker: qwenrt.LLM) -> None:
    banned = {thinker.tokenizer.added_tokens["</think>"]: -100.0}
    ask = {"messages": HELLO, "temperature": 0, "logit_bias": banned, "ignore_eos": True, "max_tokens": 900}

    async def main() -> None:
        answer = thinker.asubmit(thinker.prepare(**ask))
        deltas = [await answer.__anext__()]
        answer.end_thought()
        deltas += [delta async for delta in answer]
        assert "Considering the limited time by the user" in "".join(delta.reasoning for delta in deltas)
        assert "".join(delta.text for delta in deltas)

    asyncio.run(main())
    handle = thinker.submit(thinker.prepare(**ask))
    handle.end_thought()
    assert "Considering" in "".join(delta.reasoning for delta in handle)
    handle.end_thought()


def test_a_deadline_ends_an_answer_as_it_is(llm: qwenrt.LLM) -> None:
    reply = llm.chat(messages=HELLO, timeout=1e-9, **QUIET)
    assert (reply.finish_reason, reply.text) == ("timeout", "") and reply.timing.total_s > 0


def test_the_state_of_the_engine_is_seen_without_asking_it(llm: qwenrt.LLM, tmp_path: Path) -> None:
    assert llm.failure is None
    other = load(parrot(tmp_path / "other", SAID))
    other.close()
    assert isinstance(other.failure, RequestError) and "was closed" in str(other.failure)


def test_a_grammar_holds_the_answer_behind_a_thought_that_was_cut(thinker: qwenrt.LLM) -> None:
    pytest.importorskip("llguidance")
    grammar = qwenrt.Grammar.choice(["It is 42.", "It is 7."])

    async def main() -> None:
        for budget in (1, 2):
            whole = await thinker.achat(
                messages=HELLO, temperature=0, grammar=grammar, thinking_budget=budget, n=2
            )
            assert [choice.text for choice in whole.choices] == ["It is 42."] * 2
            assert all("Considering" in choice.reasoning for choice in whole.choices)

    asyncio.run(main())
