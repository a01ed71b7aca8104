"""Qwen2.5-Coder-0.5B-Instruct and -1.5B-Instruct beside transformers: pytest -m real.

scripts/fetch_models.py fetches them. The 0.5B part takes less than three minutes on two cores.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qwenrt
from qwenrt import SamplingParams
from tests.real.conftest import Released
from tests.real.prompts import ASKED_ROOM, CHATS, NEW_TOKENS, TEXTS

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}
SHORT = [name for name in (*CHATS, *TEXTS) if name != "long"]


def _continued(llm: qwenrt.LLM, prompt: list[int], **settings: Any) -> qwenrt.Generation:
    out = llm.generate(prompt_token_ids=prompt, sampling_params=SamplingParams(**GREEDY, **settings))
    assert isinstance(out, qwenrt.Generation)
    return out


def _prompt(released: Released, name: str) -> list[int]:
    assert released.llm.tokenizer is not None
    return released.llm.tokenizer.encode(TEXTS[name], allow_special=True)


def _assert_as_recorded(llm: qwenrt.LLM, recorded: dict[str, Any]) -> None:
    """The same tokens, each about as likely; the end of a turn ends an answer and is no part of its text."""
    out = _continued(llm, recorded["prompt"], max_tokens=len(recorded["tokens"]), logprobs=1)
    assert list(out.token_ids) == recorded["tokens"]
    assert out.logprobs is not None
    found = [entry.logprob for entry in out.logprobs]
    assert found == pytest.approx(recorded["logprobs"], abs=2e-3)


def test_token_ids_are_those_of_transformers(released: Released) -> None:
    from transformers import AutoTokenizer  # noqa: TID251 (the oracle)

    theirs, ours = AutoTokenizer.from_pretrained(released.directory), released.llm.tokenizer
    assert ours is not None
    for name in ("README.md", "README_zh.md", "csrc/pool/thread_pool.cpp", "qwenrt/engine/scheduler.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert ours.encode(text) == theirs(text)["input_ids"], name
    for name, messages in CHATS.items():
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(messages) == list(wanted), name
    for name, text in TEXTS.items():
        assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"], name


@pytest.mark.parametrize("name", SHORT)
def test_greedy_tokens_are_those_of_transformers(released: Released, name: str) -> None:
    _assert_as_recorded(released.llm, released.answer(name))


def test_several_at_once_say_what_each_says_alone(released: Released) -> None:
    asked = [released.answer(name) for name in SHORT]
    prompts = [entry["prompt"] for entry in asked]
    outs = released.llm.generate(
        prompt_token_ids=prompts, sampling_params=SamplingParams(**GREEDY, max_tokens=NEW_TOKENS)
    )
    for out, entry in zip(outs, asked, strict=True):
        assert list(out.token_ids)[: len(entry["tokens"])] == entry["tokens"]


def test_a_conversation_of_four_thousand_tokens(released: Released) -> None:
    entry = released.recorded.get("long")  # of the larger model nobody recorded it
    if entry is not None:
        _assert_as_recorded(released.llm, entry)
    assert released.llm.tokenizer is not None
    assert len(released.llm.tokenizer.encode_chat(CHATS["long"])) > 3800
    # Which code it names, in which words, is the model's affair: the small one, with transformers as well, names that
    # of another room.
    first = released.llm.chat(messages=CHATS["long"], **GREEDY, max_tokens=24)
    assert re.search(rf"\b{ASKED_ROOM}\b.*\b\d{{4}}\b", first.text), first.text
    more = [*CHATS["long"], first.message, {"role": "user", "content": "And which code has room 8?"}]
    second = released.llm.chat(messages=more, **GREEDY, max_tokens=24)
    assert re.search(r"\b8\b.*\b\d{4}\b", second.text), second.text
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_chat_in_two_languages(released: Released) -> None:
    english = released.llm.chat(messages=CHATS["english"], **GREEDY, max_tokens=32)
    assert "Paris" in english.text and english.finish_reason == "stop"
    assert "<|im_end|>" not in english.text
    chinese = released.llm.chat(messages=CHATS["chinese"], **GREEDY, max_tokens=64)
    assert "长城" in chinese.text
    streamed = "".join(
        delta.text for delta in released.llm.stream("请用一句话介绍一下长城。", **GREEDY, max_tokens=64)
    )
    assert streamed == chinese.text, "no character is cut between two deltas"


def test_fill_in_the_middle(released: Released) -> None:
    out = _continued(released.llm, _prompt(released, "middle"), max_tokens=32)
    body = out.text.splitlines()[0]
    assert body.replace(" ", "").startswith("width*height")


def test_stops(released: Released) -> None:
    llm, entry = released.llm, _prompt(released, "completion")
    plain = _continued(llm, entry, max_tokens=NEW_TOKENS)
    assert plain.finish_reason == "length" and len(plain.token_ids) == NEW_TOKENS
    assert "return" in plain.text
    cut = _continued(llm, entry, max_tokens=NEW_TOKENS, stop="return")
    assert cut.finish_reason == "stop" and cut.text == plain.text[: plain.text.index("return")]
    second = plain.token_ids[1]
    stopped = _continued(llm, entry, max_tokens=NEW_TOKENS, stop_token_ids=[second])
    assert stopped.finish_reason == "stop" and len(stopped.token_ids) <= 2


def test_the_defaults_are_nearly_exact(released: Released) -> None:
    """What qwenrt.load does unasked: rounded activations where they pay."""
    assert released.llm.tokenizer is not None
    ids = released.llm.tokenizer.encode_chat(CHATS["turns"])
    wanted = released.llm.logits(ids).log_softmax(-1)
    with qwenrt.load(str(released.directory), max_model_len=1024) as llm:
        got = llm.logits(ids).log_softmax(-1)
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))
    assert float((wanted.exp() * (wanted - got)).sum(-1).mean()) < 1e-6
