"""OpenAI's chats and completions over a socket, with a scripted model behind the whole server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import qwenrt
from qwenrt.server import kept_streams, streams
from tests.server.asking import CHAT, COMPLETIONS, Gate, ask, chat, events, joined, read, sent, serve
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving, until

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "杭州"}}\n</tool_call>'
REPLIES = {
    "think": "<think>\nlong ago\n</think>\n\nThe answer.",
    "call": f"I look.\n{CALL}",
    "two calls": f"{CALL}\n{CALL.replace('杭州', '北京')}",
    "broken": '<tool_call>\n{"name": "weather", "arguments": {"city": \n</tool_call>',
    "unclosed": '<tool_call>\n{"name": "weather", "arguments": {"city": "Par',
    "stop in call": '<tool_call>\n{"name": "weather", "arguments": {"city": "a END b"}}\n</tool_call>',
    "stop in thought": "<think>\nEND of thought\n</think>\n\nBefore END after",
    "long": "word " * 3000,
}
PROMPTS: list[str] = []


def reply(prompt: str) -> str:
    PROMPTS.append(prompt)
    said = prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0].strip()
    return REPLIES.get(said, f"You said {said}.")


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with scripted_llm(reply, max_model_len=8192, max_num_seqs=8, max_num_batched_tokens=256) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def gate(llm: qwenrt.LLM) -> Gate:
    return Gate(llm)


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM, gate: Gate) -> Iterator[Serving]:
    with serve(llm, served_model_names=("qwen", "gpt-4")) as running:
        yield running


# ---- names


def test_the_model_that_answers_is_told_whatever_was_asked_for(served: Serving) -> None:
    for path, body in ((CHAT, chat("x")), ("/v1/messages", chat("x", max_tokens=9)), (CHAT, {"model": 1})):
        _, headers, _ = ask(served, path, body)
        assert headers["x-qwenrt-model"] == "qwen"
    assert ask(served, CHAT, {**chat("x"), "model": "claude-9"})[2]["model"] == "qwen"
    _, headers, chunks = ask(served, CHAT, {**chat("x", stream=True), "model": "any"})
    assert headers["x-qwenrt-model"] == "qwen" and {chunk["model"] for chunk in events(chunks)} == {"qwen"}


def test_a_strict_server_serves_its_own_names_only(llm: qwenrt.LLM) -> None:
    with serve(llm, strict_model=True, served_model_names=("qwen", "gpt-4")) as strict:
        assert ask(strict, CHAT, {**chat("x"), "model": "gpt-4"})[0] == 200
        for path, body in (
            (CHAT, chat("x")),
            ("/v1/messages", chat("x", max_tokens=9)),
            ("/api/chat", chat("x")),
            ("/api/show", {"model": "m"}),
            ("/v1/embeddings", {"model": "m", "input": "x"}),
        ):
            status, _, told = ask(strict, path, body)
            assert status == 404 and "qwen, gpt-4" in json.dumps(told), path


def test_models_have_what_each_client_reads_the_window_from(served: Serving) -> None:
    _, _, told = ask(served, "/v1/models")
    assert [one["id"] for one in told["data"]] == ["qwen", "gpt-4"]
    assert all(one["max_model_len"] == 8192 and one["owned_by"] for one in told["data"])
    assert told["data"][0]["display_name"] and told["data"][0]["type"] == "model"  # Anthropic's


# ---- fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e308}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"n": 10**6}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**64}, "max_tokens"),
        ({"seed": "one"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"stop": "x" * 2**20}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 10**4}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"timeout": 0}, "timeout"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
    ],
)
def test_what_is_wrong_is_400_with_its_path(served: Serving, fields: dict[str, Any], param: str) -> None:
    status, _, told = ask(served, CHAT, {**chat("x"), **fields})
    assert status == 400
    assert told["error"]["param"] and told["error"]["param"].startswith(param), told


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_numbers_that_json_has_not_are_no_json(served: Serving, number: str) -> None:
    body = json.dumps(chat("x")).replace("}]", "}]" + f', "temperature": {number}')
    status, _, told = ask(served, CHAT, body.encode())
    assert status == 400 and told["error"]["type"] == "invalid_request_error"


def test_a_bias_for_a_token_that_is_none_is_refused_at_once(served: Serving) -> None:
    status, _, told = ask(served, CHAT, chat("x", logit_bias={"999999": 1}))
    assert status == 400 and "vocabulary" in told["error"]["message"]


def test_zero_null_and_absent_are_told_apart_and_unknown_fields_are_not_read(served: Serving) -> None:
    for fields in (
        {"temperature": 0, "top_p": None, "stop": None, "tools": None, "max_tokens": None, "n": None},
        {"temperature": 0, "made_up": {"x": 1}, "metadata": {"a": "b"}, "user": "u", "store": False},
        {"temperature": 0, "top_k": 0},
    ):
        assert ask(served, CHAT, chat("x", **fields))[2]["choices"][0]["message"]["content"] == "You said x."
    twice = json.dumps(chat("x")).replace('"model": "m"', '"model": "m", "max_tokens": 0, "max_tokens": 2')
    answer = ask(served, CHAT, twice.encode())[2]  # the last one counts
    assert answer["usage"]["completion_tokens"] == 2 and answer["choices"][0]["finish_reason"] == "length"


def test_a_greedy_request_with_a_top_p_of_nothing(served: Serving) -> None:
    status, _, told = ask(served, CHAT, chat("x", temperature=0, top_p=0))
    assert status == 400 and told["error"]["param"] == "top_p"


@pytest.mark.parametrize(
    "content", ["plain", [{"type": "text", "text": "pl"}, {"type": "text", "text": "ain"}]]
)
def test_developers_are_the_system_and_contents_are_texts_or_parts(served: Serving, content: Any) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": content}]
    answer = ask(served, CHAT, {"model": "m", "messages": messages})[2]
    assert answer["choices"][0]["message"]["content"] == "You said plain."
    assert any("<|im_start|>system\nBe brief." in prompt for prompt in PROMPTS)


def test_an_answer_that_was_begun_is_continued(served: Serving) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "It was"}]
    for history in (messages, [messages[0], messages[1], messages[1]]):
        assert ask(served, CHAT, {"model": "m", "messages": history})[0] == 200
        assert PROMPTS[-1].endswith("It was")


# ---- thoughts


def test_thoughts_have_both_names_whole_and_in_pieces(served: Serving) -> None:
    body = chat("think", stream_options={"include_usage": True})
    message = ask(served, CHAT, body)[2]["choices"][0]["message"]
    assert (
        message["reasoning_content"] == message["reasoning"] == "\nlong ago\n"
        or "long ago" in message["reasoning"]
    )
    assert message["content"] == "The answer."
    chunks = events(ask(served, CHAT, {**body, "stream": True})[2])
    for name in ("reasoning_content", "reasoning"):
        assert joined(chunks, name) == message["reasoning"]
    assert joined(chunks) == "The answer."
    usage = chunks[-1]["usage"]
    assert chunks[-1]["choices"] == [] and usage["completion_tokens_details"]["reasoning_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_is_read_back_over_a_tools_turn(served: Serving, name: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", name: "I must look", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "warm"},
    ]
    body = {"model": "m", "messages": messages, "tools": [WEATHER]}
    assert "I must look" in ask(served, CHAT + "/render", body)[2]["prompt"]


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": False},
        {"thinking_budget": 0},
    ],
)
def test_thinking_is_turned_off_in_each_way(served: Serving, fields: dict[str, Any]) -> None:
    prompt = ask(served, CHAT + "/render", chat("x", **fields))[2]["prompt"]
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert not ask(served, CHAT + "/render", chat("x"))[2]["prompt"].endswith("</think>\n\n")


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_budget": 5},
        {"chat_template_kwargs": {"thinking_budget": 5}},
        {"reasoning_effort": "minimal"},
    ],
)
def test_a_thought_that_does_not_end_has_a_budget(fields: dict[str, Any]) -> None:
    def endless(prompt: str) -> str:
        return "Enough." if "limited time" in prompt else "<think>\n" + "and then " * 20000

    with scripted_llm(endless, max_model_len=32768) as llm, serve(llm) as served:
        choice = ask(served, CHAT, chat("x", max_tokens=30000, **fields))[2]["choices"][0]
    assert choice["message"]["content"] == "Enough." and choice["finish_reason"] == "stop"


def test_a_thought_is_ended_by_whoever_knows_the_answers_id() -> None:
    def thinking(prompt: str) -> str:
        return "The answer." if "limited time" in prompt else "and then " * 3000

    keys = {"authorization": "Bearer one"}
    with scripted_llm(thinking, max_model_len=16384, chat="thinking") as llm:
        gate = Gate(llm)
        with (
            serve(llm, api_keys=("one", "two")) as served,
            served.wire(sent(CHAT, chat("x", stream=True, max_tokens=16000), **keys)) as wire,
        ):
            wire.read_until(b'"reasoning"')
            with gate.closed():
                came = wire.came
                answer_id = next(iter(served.application.service.running))  # type: ignore[attr-defined]
                body = {"id": answer_id, "action": "reasoning_end"}
                assert ask(served, CHAT + "/control", body, authorization="Bearer two")[0] == 404
                assert ask(served, CHAT + "/control", {**body, "action": "x"}, **keys)[0] == 400
                assert ask(served, CHAT + "/control", body, **keys)[2] == {"success": True}
            wire.came = came
            rest = wire.read_until(b"[DONE]")
            assert joined(events(rest)) == "The answer." and b'"finish_reason":"stop"' in rest
            assert rest.count(b'"reasoning"') < 5000
            assert ask(served, CHAT + "/control", body, **keys)[0] == 404


# ---- choices, stops, probabilities


def test_n_answers_whole_and_streamed(served: Serving) -> None:
    body = chat("x", n=3, temperature=1)
    answer = ask(served, CHAT, body)[2]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"You said x."}
    one = ask(served, CHAT, chat("x"))[2]["usage"]
    assert answer["usage"]["completion_tokens"] == 3 * one["completion_tokens"]
    assert answer["usage"]["prompt_tokens"] == one["prompt_tokens"]
    chunks = events(ask(served, CHAT, {**body, "stream": True})[2])
    assert [joined(chunks, index=index) for index in range(3)] == ["You said x."] * 3
    assert sum(choice["finish_reason"] == "stop" for c in chunks for choice in c["choices"]) == 3


def test_the_best_of_several_and_64_in_all(served: Serving) -> None:
    answer = ask(served, CHAT, chat("x", best_of=4, n=2))[2]
    assert len(answer["choices"]) == 2 and answer["choices"][0]["logprobs"] is None
    assert ask(served, CHAT, chat("x", best_of=65))[0] == 400
    assert ask(served, COMPLETIONS, {"model": "m", "prompt": ["a"] * 33, "n": 2})[0] == 400
    assert ask(served, CHAT, chat("x", best_of=3, stream=True))[0] == 400


def test_stop_strings_are_about_the_answer_and_not_the_thought_or_the_call(served: Serving) -> None:
    choice = ask(served, CHAT, chat("stop in thought", stop="END"))[2]["choices"][0]
    assert choice["message"]["content"] == "Before " and "END of thought" in choice["message"]["reasoning"]
    choice = ask(served, CHAT, chat("stop in call", stop=["END"], tools=[WEATHER]))[2]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "a END b"}
    chunks = events(ask(served, CHAT, chat("stop in thought", stop=["END"], stream=True))[2])
    assert joined(chunks) == "Before "
    assert ask(served, CHAT, chat("x", stop=["q" + str(i) for i in range(64)]))[0] == 200


def test_logprobs_have_bytes_and_completions_the_older_form(served: Serving) -> None:
    choice = ask(served, CHAT, chat("杭", logprobs=True, top_logprobs=2))[2]["choices"][0]
    entries = choice["logprobs"]["content"]
    spelled = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert spelled.startswith("You said 杭.".encode()) and all(len(e["top_logprobs"]) == 2 for e in entries)
    body = {"model": "m", "prompt": "x", "logprobs": 1, "max_tokens": 3}
    logprobs = ask(served, COMPLETIONS, body)[2]["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 3 and logprobs["text_offset"][0] == 0


def test_completions_of_texts_and_ids_with_echo(served: Serving) -> None:
    ids = ask(served, "/tokenize", {"model": "m", "prompt": "x y"})[2]["tokens"]
    for prompt, count in (("x y", 1), (ids, 1), (["x y", "x y"], 2), ([ids, ids, ids], 3)):
        body = {"model": "m", "prompt": prompt, "echo": True, "max_tokens": 4}
        choices = ask(served, COMPLETIONS, body)[2]["choices"]
        assert [choice["index"] for choice in choices] == list(range(count))
        assert {choice["text"] for choice in choices} == {choices[0]["text"]}
        assert choices[0]["text"].startswith("x yYou")
    status, _, told = ask(served, COMPLETIONS, {"model": "m", "prompt": [1, 999999]})
    assert status == 400 and told["error"]["param"] == "prompt[1]" and "3071" in told["error"]["message"]


def test_several_prompts_stream_beside_each_other(served: Serving) -> None:
    body = {"model": "m", "prompt": ["a", "b", "c"], "stream": True, "max_tokens": 4}
    chunks = events(ask(served, COMPLETIONS, body)[2])
    texts = ["" for _ in range(3)]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert all(texts) and sum(c["choices"][0]["finish_reason"] == "length" for c in chunks) == 3


# ---- calls


def test_calls_stream_in_pieces_that_join_to_the_whole(served: Serving) -> None:
    body = chat("two calls", tools=[WEATHER])
    whole = ask(served, CHAT, body)[2]["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    chunks = events(ask(served, CHAT, {**body, "stream": True})[2])
    pieces = [p for c in chunks for choice in c["choices"] for p in choice["delta"].get("tool_calls", ())]
    for index, call in enumerate(whole["message"]["tool_calls"]):
        mine = [piece for piece in pieces if piece["index"] == index]
        assert (
            "".join(piece["function"].get("arguments", "") for piece in mine) == call["function"]["arguments"]
        )
        assert mine[0]["id"] and mine[0]["function"]["name"] == "weather"
    assert len(pieces) > 4  # as they are written, not at the end


def test_one_call_is_all_where_calls_may_not_be_parallel(served: Serving) -> None:
    body = chat("two calls", tools=[WEATHER], parallel_tool_calls=False)
    choice = ask(served, CHAT, body)[2]["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1 and choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_required_is_enforced(served: Serving, choice: Any) -> None:
    answer = ask(served, CHAT, chat("x", tools=[WEATHER], tool_choice=choice, max_tokens=200, temperature=0))[
        2
    ]
    assert answer["choices"][0]["finish_reason"] in ("tool_calls", "length")
    if answer["choices"][0]["finish_reason"] == "tool_calls":
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert answer["choices"][0]["message"]["content"] in ("", None)


def test_a_choice_of_none_and_tools_that_cannot_be(served: Serving) -> None:
    choice = ask(served, CHAT, chat("call", tools=[WEATHER], tool_choice="none"))[2]["choices"][0]
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    for fields in (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "absent"}}},
        {"tools": [WEATHER, WEATHER]},
        {"tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": 3}}}]},
        {"tools": [{"type": "function", "function": {"name": "a b\n"}}]},
        {"tool_choice": "required"},
    ):
        assert ask(served, CHAT, chat("x", **fields))[0] == 400, fields


def test_hosted_tools_are_told_and_not_served(served: Serving) -> None:
    body = chat("x", tools=[{"type": "web_search"}, {"type": "é\r\nx: y"}, WEATHER])
    status, headers, _ = ask(served, CHAT, body)
    assert status == 200 and headers["x-qwenrt-ignored"].startswith("web_search, ") and "x" not in headers


@pytest.mark.parametrize("kind", ["broken", "unclosed"])
def test_a_broken_call_is_text_or_unfinished_and_is_counted(served: Serving, kind: str) -> None:
    def counted() -> float:
        text = ask(served, "/metrics")[2].decode()
        return float(text.split("\nqwenrt_call_errors_total ")[1].split("\n")[0])

    body = chat(kind, tools=[WEATHER], max_tokens=300)
    before = counted()
    status, headers, answer = ask(served, CHAT, body)
    choice = answer["choices"][0]
    assert status == 200 and headers["x-qwenrt-call-error"] == "1"
    assert choice["qwenrt"]["broken_calls"] == 1 and choice["finish_reason"] in ("stop", "tool_calls")
    stream = ask(served, CHAT, {**body, "stream": True})[2]
    assert stream.endswith(b"data: [DONE]\n\n") and b'"broken_calls":1' in stream and b'"error"' not in stream
    until(lambda: counted() == before + 2)


def test_the_older_functions_get_a_function_call(served: Serving) -> None:
    body = chat("call", functions=[WEATHER["function"]])
    choice = ask(served, CHAT, body)[2]["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert json.loads(choice["message"]["function_call"]["arguments"]) == {"city": "杭州"}
    chunks = events(ask(served, CHAT, {**body, "stream": True})[2])
    pieces = [
        c["delta"]["function_call"] for k in chunks for c in k["choices"] if "function_call" in c["delta"]
    ]
    assert (
        "".join(piece.get("arguments", "") for piece in pieces)
        == choice["message"]["function_call"]["arguments"]
    )


def test_the_seeds_scripts_call_with_react_and_stop_at_the_observation() -> None:
    written = 'I look.\nAction: weather\nAction Input: {"city": "Paris"}\nObservation: made up'
    with scripted_llm(lambda prompt: written, max_model_len=4096, chat="qwen1") as llm, serve(llm) as served:
        body = chat("Is it warm?", functions=[WEATHER["function"]], stop=["Observation:"])
        for fields in ({}, {"stream": True}):
            _, _, came = ask(served, CHAT, {**body, **fields})
            text = came.decode() if fields else json.dumps(came)
            assert "function_call" in text and "made up" not in text
        result = {"role": "function", "name": "weather", "content": "warm"}
        call = {"name": "weather", "arguments": '{"city": "Paris"}'}
        asked = {"role": "assistant", "content": None, "function_call": call}
        body["messages"] = [*body["messages"], asked, result]
        assert "Observation: warm" in ask(served, CHAT + "/render", body)[2]["prompt"]


# ---- prompts: seen, counted, cached, on their way


def test_usage_says_what_was_cached_and_what_was_computed(served: Serving) -> None:
    question = "cached " * 100
    first, second = (ask(served, CHAT, chat(question))[2] for _ in range(2))
    for answer in (first, second):
        usage, told = answer["usage"], answer["qwenrt"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert told["cached_tokens"] == cached and told["computed_tokens"] == usage["prompt_tokens"] - cached
    assert second["qwenrt"]["computed_tokens"] <= 32 < first["qwenrt"]["computed_tokens"]
    chunks = events(ask(served, CHAT, chat(question, stream=True, stream_options={"include_usage": True}))[2])
    assert chunks[-1]["qwenrt"]["computed_tokens"] == second["qwenrt"]["computed_tokens"]


def test_salts_and_keys_share_nothing(llm: qwenrt.LLM, served: Serving) -> None:
    question = "salted " * 100

    def cached(server: Serving, key: str = "", **fields: Any) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = ask(server, CHAT, chat(question, **fields), **headers)[2]
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(served) == 0 and cached(served) > 64
    assert cached(served, cache_salt="a") == 0 and cached(served, cache_salt="a") > 64
    with serve(llm, api_keys=("one", "two")) as keyed:
        assert cached(keyed, "one") == 0 and cached(keyed, "two") == 0 and cached(keyed, "one") > 64
        assert cached(keyed, "two", cache_salt="a") == 0
    with serve(llm, api_keys=("one", "two"), share_prefixes=True) as shared:
        assert cached(shared, "one") > 64 and cached(shared, "two") > 64


def test_a_prompt_on_its_way_is_told(served: Serving, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PROGRESS_SECONDS", 0.01)
    steps = threading.Semaphore(0)
    gate.before = lambda step: steps.acquire(timeout=20)
    try:
        body = chat("progress " * 200, stream=True, return_progress=True, max_tokens=3)
        with served.wire(sent(CHAT, body)) as wire:
            steps.release()  # one chunk of the prompt
            wire.read_until(b'"processed":256')
            steps.release()
            wire.read_until(b'"processed":512')
            for _ in range(1000):
                steps.release()
            rest = wire.read_until(b"[DONE]")
    finally:
        gate.before = lambda step: None
    assert b'"prompt_progress":{"total":' in rest and b'"finish_reason":"length"' in rest
    chunks = events(ask(served, CHAT, body)[2])
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert told[-1]["processed"] == told[-1]["total"] and told[-1]["cache"] > 512
    plain = ask(served, CHAT, {**body, "return_progress": False})[2]
    assert b"prompt_progress" not in plain


def test_several_prompts_on_their_way_are_told_together(served: Serving) -> None:
    body = {
        "model": "m",
        "prompt": ["one two", "three"],
        "stream": True,
        "return_progress": True,
        "max_tokens": 2,
    }
    status, _, stream = ask(served, COMPLETIONS, body)
    told = [c["prompt_progress"] for c in events(stream) if "prompt_progress" in c]
    assert status == 200 and told[-1]["processed"] == told[-1]["total"] and stream.endswith(b"[DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "body", "ping"),
    [
        (CHAT, chat("ping", stream=True), b": ping\n\n"),
        ("/v1/responses", {"model": "m", "input": "ping", "stream": True}, b": ping\n\n"),
        ("/v1/messages", chat("ping", stream=True, max_tokens=9), b"event: ping\ndata: "),
    ],
)
def test_a_stream_that_waits_pings(
    served: Serving, gate: Gate, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, ping: bytes
) -> None:
    monkeypatch.setattr(streams, "PING_SECONDS", 0.02)
    with gate.closed(), served.wire(sent(path, body)) as wire:
        wire.read_until(ping)
        wire.read_until(ping)
    assert streams.PING_SECONDS < 15.0
    gate.idle()


def test_a_stream_that_is_kept_counts_its_pings(
    served: Serving, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow prompt looks like no loss, and who reads on from a byte misses and doubles nothing."""
    monkeypatch.setattr(kept_streams, "PING_SECONDS", 0.02)
    monkeypatch.setattr(streams, "PING_SECONDS", 0.02)
    conversation = "6fa459ea-ee8a-4ca4-894e-db77e160355e"
    with gate.closed():
        with served.wire(sent(CHAT, chat("kept", stream=True), x_conversation_id=conversation)) as wire:
            head = wire.read_until(b": ping\n\n")
            first = head.partition(b"\r\n\r\n")[2]
        size = sum(map(len, first.split(b"\r\n")[1::2]))
        assert size > 0
        with served.wire(sent(f"/v1/stream?conv_id={conversation}&from={size}")) as again:
            again.read_until(b": ping\n\n")
            gate._open.set()
            _, _, rest = ask(served, f"/v1/stream?conv_id={conversation}&from={size}")
    _, _, whole = ask(served, f"/v1/stream?conv_id={conversation}")
    assert whole[size:] == rest and joined(events(whole)) == "You said kept."


def test_a_prompt_fits_exactly_or_is_refused_with_both_numbers(served: Serving) -> None:
    empty = ask(served, CHAT + "/input_tokens", chat(""))[2]["input_tokens"]
    per_word = ask(served, CHAT + "/input_tokens", chat(" a" * 100))[2]["input_tokens"] - empty
    count = (8192 - empty) * 100 // per_word - 20
    words = " a" * count
    while (now := ask(served, CHAT + "/input_tokens", chat(words))[0]) == 200 and len(words) < 40000:
        words += " a"
    assert now == 400
    status, headers, answer = ask(served, CHAT, chat(words[:-2], max_tokens=2))
    assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
    assert headers["x-qwenrt-max-tokens"] == "1" and answer["usage"]["total_tokens"] == 8192
    status, _, told = ask(served, CHAT, chat(words))
    assert status == 400 and "maximum context length is 8192 tokens" in told["error"]["message"]
    for path in (CHAT, "/v1/messages", "/api/chat"):  # clearly too much is not counted to its end
        status, _, told = ask(served, path, chat(" a" * 400_000, max_tokens=2))
        assert status == 400, told
        about = int(re.findall("about ([0-9]+)|([0-9]{5,}) tokens", str(told))[0][path == "/v1/messages"])
        assert abs(about - 4000 * per_word) < 0.05 * 4000 * per_word


def test_a_text_that_ends_nowhere_ends_with_the_context(served: Serving) -> None:
    answer = ask(served, COMPLETIONS, {"model": "m", "prompt": "x", "ignore_eos": True, "max_tokens": 9000})[
        2
    ]
    assert answer["usage"]["total_tokens"] == 8192 and answer["choices"][0]["finish_reason"] == "length"


def test_deadlines_give_what_there_is_or_504(served: Serving, gate: Gate) -> None:
    body = chat("long", timeout=0.05, max_tokens=8000)
    gate.before = lambda step: threading.Event().wait(0.005)
    try:
        choice = ask(served, CHAT, body)[2]["choices"][0]
        assert choice["finish_reason"] == "length" and choice["qwenrt"] == {"finish_reason": "timeout"}
        assert choice["message"]["content"].startswith("word")
        chunks = events(ask(served, CHAT, {**body, "stream": True})[2])
        assert chunks[-1]["choices"][0]["qwenrt"] == {"finish_reason": "timeout"}
    finally:
        gate.before = lambda step: None
    with gate.closed(), served.wire(sent(CHAT, chat("hold"))) as first:
        assert gate.waiting.wait(20)
        with served.wire(sent(CHAT, chat("late", timeout=0.01))) as wire:
            until(lambda: len(served.application.service.running) == 2)  # type: ignore[attr-defined]
            threading.Event().wait(0.05)
            gate._open.set()
            status, _, told = read(wire)
            assert status == 504 and told["error"]["type"] == "timeout_error"
        assert read(first)[0] == 200
    gate.idle()
