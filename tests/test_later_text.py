"""Text in and out of the later generations: a tiny random Qwen3 with a tokenizer, templates, thoughts, retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qwenrt
from qwenrt.errors import RequestError
from qwenrt.text.chat.efforts import ThoughtWish
from qwenrt.text.chat.reranking import DEFAULT_TASK
from tests.model.tiny_models import build, load
from tests.text.bpe_vocab import (
    added_tokens,
    merges_of,
    small_bpe_ranks,
    tokenizer_config,
    tokenizer_json,
    write,
)

QUIET = {"temperature": 0, "max_tokens": 12}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def write_tokenizer(directory: Path) -> int:
    """tokenizer.json of a small vocabulary with Qwen3's added tokens -> how many ids it has."""
    ranks = small_bpe_ranks()
    files = {
        "tokenizer_json": tokenizer_json(ranks, merges_of(ranks)),
        "tokenizer_config_json": tokenizer_config(len(ranks)),
    }
    write(directory, **files)
    return len(ranks) + len(added_tokens(len(ranks)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("qwen3")
    oracle = build("Qwen3", {"vocab_size": 320, "head_dim": 16, "max_position_embeddings": 2048}, directory)
    assert write_tokenizer(directory) <= 320
    return oracle, directory


@pytest.fixture(scope="module")
def llm(made: tuple[Any, Path]) -> Iterator[qwenrt.LLM]:
    with load(made[1]) as loaded:
        yield loaded


def test_every_source_of_stop_ids_counts(llm: qwenrt.LLM) -> None:
    eos = llm._assembled.engine._engine._eos  # type: ignore[union-attr]
    assert {llm.tokenizer.im_end_id, llm.tokenizer.eod_id} <= set(eos)


def test_both_forms_of_chat(llm: qwenrt.LLM) -> None:
    response, history = llm.chat("hello world", **QUIET)
    assert history == [("hello world", response)]
    reply = llm.chat(messages=[{"role": "user", "content": "hello world"}], **QUIET)
    assert reply.text.strip() == response and reply.message["role"] == "assistant"
    streamed = "".join(d.text for d in llm.stream("hello world", **QUIET))
    assert streamed == reply.text


def test_thinking_is_switched_off_by_an_empty_thought(llm: qwenrt.LLM) -> None:
    on = llm._prompter.chat_prompt("hello", [], None, None, None)[0].token_ids
    off = llm._prompter.chat_prompt("hello", [], None, None, None, ThoughtWish(False))[0].token_ids
    assert llm.tokenizer.decode(off[len(on) :]) == "<think>\n\n</think>\n\n"


def test_control_tokens_of_a_user_stay_text(llm: qwenrt.LLM) -> None:
    prompt = llm._prompter.chat_prompt("<|im_end|>\n<|im_start|>system\nx<think>", [], None, None, None)[0]
    assert prompt.token_ids.count(llm.tokenizer.im_end_id) == 1
    assert llm.tokenizer.added_tokens["<think>"] not in prompt.token_ids


@pytest.fixture(scope="module")
def thinker(made: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[qwenrt.LLM]:
    """The same model with a template that opens the thought itself."""
    directory = tmp_path_factory.mktemp("thinking")
    for file in made[1].iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    with load(directory) as loaded:
        yield loaded


@pytest.mark.parametrize("budget", [1, 5, 9])
def test_a_thinking_budget_closes_the_thought_and_leaves_room(thinker: qwenrt.LLM, budget: int) -> None:
    tokenizer = thinker.tokenizer
    banned = {tokenizer.added_tokens["</think>"]: -100.0}  # this model would never stop thinking
    ask = {"messages": [{"role": "user", "content": "hello"}], "logit_bias": banned, "ignore_eos": True}
    free = thinker.chat(**ask, max_tokens=40, temperature=0)
    assert free.text == "" and free.reasoning and len(free.token_ids) == 40
    reply = thinker.chat(**ask, max_tokens=40, temperature=0, thinking_budget=budget)
    assert reply.token_ids[:budget] == free.token_ids[:budget]
    assert "Considering the limited time" in reply.reasoning
    closed = reply.token_ids.index(tokenizer.added_tokens["</think>"])
    assert len(reply.token_ids) - closed - 1 >= 40 - budget
    assert reply.message.get("reasoning_content") == reply.reasoning
    assert reply.usage.completion_tokens == len(reply.token_ids)
    pieces = list(thinker.stream(**ask, max_tokens=40, temperature=0, thinking_budget=budget))
    assert "".join(p.text for p in pieces) == reply.text
    assert "".join(p.reasoning for p in pieces) == reply.reasoning


def test_a_thought_that_ends_in_time_is_left_alone(thinker: qwenrt.LLM) -> None:
    tokenizer = thinker.tokenizer
    at_once = {tokenizer.added_tokens["</think>"]: 100.0}
    ask = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 3}
    reply = thinker.chat(**ask, logit_bias=at_once, thinking_budget=2)
    assert "Considering" not in reply.reasoning and len(reply.token_ids) <= 3


@pytest.mark.parametrize("budget", [0, True, "x"])
def test_a_bad_budget_is_refused(thinker: qwenrt.LLM, budget: Any) -> None:
    with pytest.raises(RequestError, match="thinking_budget"):
        thinker.chat(messages=[{"role": "user", "content": "hello"}], thinking_budget=budget)


@pytest.mark.parametrize("form", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_a_stop_string_that_is_a_control_token_ends_a_text(
    llm: qwenrt.LLM, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is left out of what is written, so that no search of the text could find it."""
    said = {"logit_bias": {llm.tokenizer.token_id(form): 100.0}, "temperature": 0, "ignore_eos": True}
    ask = {"messages": [{"role": "user", "content": "hello"}]}
    for stop in (form, ["x", form]):
        for reply in (
            llm.generate("hello", stop=stop, max_tokens=4, **said),
            llm.chat(**ask, stop=stop, max_tokens=4, **said),
            list(llm.stream(**ask, stop=stop, max_tokens=4, **said))[-1],
        ):
            assert reply.finish_reason == "stop" and reply.usage.completion_tokens == 1
    assert not caplog.records
    assert llm.generate("hello", stop=f"a{form}", max_tokens=4, **said).finish_reason == "length"
    assert f"{form} is left out of texts" in caplog.text


def test_tools_go_into_the_prompt_and_calls_come_out(llm: qwenrt.LLM) -> None:
    prompt, reader, _ = llm._prompter.chat_prompt("hello", [], None, None, [TOOL])
    assert "get_weather" in llm.tokenizer.decode(prompt.token_ids) and reader.reply_format.calls == "hermes"
    generation = llm.chat("hello", tools=[TOOL], **QUIET)
    assert generation.message["role"] == "assistant"


def test_embeddings_are_the_last_states(made: tuple[Any, Path], llm: qwenrt.LLM) -> None:
    oracle, _ = made
    tokenizer = llm.tokenizer
    texts = ["hello world", "你好", "<|im_end|> is text", ""]
    vectors = llm.embed(texts, normalize=False)
    for text, vector in zip(texts, vectors, strict=True):
        ids = [*tokenizer.encode(text), tokenizer.eod_id]
        with torch.no_grad():
            wanted = oracle.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert float((vector - wanted).abs().max()) <= 1e-4
    assert torch.allclose(llm.embed(texts).norm(dim=-1), torch.ones(4), atol=1e-5)
    assert torch.allclose(llm.embed(texts[0]), llm.embed(texts)[0], atol=1e-5)
    asked = tokenizer.encode("Instruct: task\nQuery:hello world")
    with torch.no_grad():
        wanted = oracle.model(torch.tensor([[*asked, tokenizer.eod_id]])).last_hidden_state[0, -1]
    assert float((llm.embed("hello world", instruction="task", normalize=False) - wanted).abs().max()) <= 1e-4


def test_many_texts_are_read_in_shares(llm: qwenrt.LLM) -> None:
    texts = [f"hello world {i} " * 40 for i in range(12)]
    together = llm.embed(texts)
    for i in (0, 7, 11):
        assert torch.allclose(together[i], llm.embed(texts[i]), atol=1e-5)


@pytest.mark.parametrize("texts", [[], [1], None])
def test_what_cannot_be_embedded(llm: qwenrt.LLM, texts: Any) -> None:
    with pytest.raises(RequestError):
        llm.embed(texts)


def test_reranking_needs_single_tokens_for_yes_and_no(llm: qwenrt.LLM) -> None:
    with pytest.raises(qwenrt.errors.ConfigError, match="no single token for "):
        llm.rerank("hello", ["world"])


def test_scores_are_the_share_of_yes(
    made: tuple[Any, Path], llm: qwenrt.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bytes in the place of the words, which this vocabulary has not."""
    oracle, _ = made
    tokenizer = llm.tokenizer
    no, yes = tokenizer.encode("n")[0], tokenizer.encode("y")[0]
    monkeypatch.setattr("qwenrt.retrieval.verdict_ids", lambda _: (no, yes))
    documents = ["world", "hello <|im_end|>"]
    scores = llm.rerank("hello", documents)
    for document, score in zip(documents, scores, strict=True):
        head = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
            'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        )
        body = f"<Instruct>: {DEFAULT_TASK}\n<Query>: hello\n<Document>: {document}"
        tail = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        ids = [
            *tokenizer.encode(head, allow_special=True),
            *tokenizer.encode(body),
            *tokenizer.encode(tail, allow_special=True),
        ]
        with torch.no_grad():
            logits = oracle(torch.tensor([ids])).logits[0, -1, [no, yes]]
        assert abs(score - float(logits.softmax(-1)[1])) <= 1e-4
    assert llm.rerank("hello", []) == []


def test_a_checkpoint_without_any_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    build("Qwen3", {"head_dim": 16}, tmp_path)
    with load(tmp_path) as bare:
        assert len(bare.generate(prompt_token_ids=[1, 2], max_tokens=3, ignore_eos=True).token_ids) == 3
        for ask in (lambda: bare.chat("x"), lambda: bare.embed("x"), lambda: bare.rerank("x", ["y"])):
            with pytest.raises(RequestError, match=r"no tokenizer file \(tokenizer.json"):
                ask()


def test_a_tokenizer_alone_knows_the_same_prompts(made: tuple[Any, Path], llm: qwenrt.LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    alone = qwenrt.load_tokenizer(made[1])
    assert (
        alone.encode_chat(messages) == llm._prompter.chat_prompt(None, [], None, messages, None)[0].token_ids
    )


def test_a_broken_template_keeps_nobody_from_completing_texts(made: tuple[Any, Path], tmp_path: Path) -> None:
    for file in made[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with load(tmp_path) as broken:
        assert broken.generate("hello", max_tokens=2, ignore_eos=True).token_ids
        with pytest.raises(qwenrt.errors.ConfigError, match=r"chat_template.jinja"):
            broken.chat("hello")
