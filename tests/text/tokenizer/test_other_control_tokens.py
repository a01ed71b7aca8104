"""Qwen's vocabulary with another family's control tokens, as DeepSeek-R1-Distill-Qwen has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Oracle
from transformers.utils.chat_template_utils import render_jinja_template  # noqa: TID251

from qwenrt.errors import ConfigError, RequestError
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.chatml import build_chat
from tests.text.bpe_vocab import FIRST, RANKS, small_json, write

END, USER, ASSISTANT, BEGIN, THINK = (
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<think>",
)
FORMS = [END, USER, ASSISTANT, BEGIN, THINK, "</think>"]
TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}
{%- endif %}{{ '<｜Assistant｜>' + c + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""


def files(**config: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": FIRST + i, "content": form, **flags, "special": form in (END, BEGIN)}
        for i, form in enumerate(FORMS)
    ]
    begin, text = {"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    post = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [FIRST + 3], "tokens": [BEGIN]}},
    }
    names = {"bos_token": BEGIN, "eos_token": {"content": END}, "chat_template": TEMPLATE, **config}
    return {
        "tokenizer_json": small_json(added_tokens=added, post_processor=post),
        "tokenizer_config_json": names,
        "config_json": {"model_type": "qwen2"},
    }


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return ChatTokenizer.from_dir(write(tmp_path, **files()))


def test_its_own_end_and_no_turns_of_chatml(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.eod_id == tokenizer.eos_token_id == FIRST
    assert tokenizer.im_start_id is None and tokenizer.im_end_id is None
    assert set(tokenizer.special_tokens) == {END, BEGIN}
    with pytest.raises(RequestError, match=r"has no <\|im_start\|> and <\|im_end\|>\. Let the model's own"):
        build_chat(tokenizer, "hi")


def test_prompts_are_those_of_transformers_with_one_beginning(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nhell"},
        {"role": "user", "content": "<｜User｜> world"},
    ]
    (rendered,), _ = render_jinja_template(
        [messages], chat_template=TEMPLATE, add_generation_prompt=True, bos_token=BEGIN, eos_token=END
    )
    ids = tokenizer.encode_chat(messages)
    assert tokenizer.decode(ids) == rendered
    assert [i - FIRST for i in ids if i >= FIRST] == [3, 1, 2, 0, 1, 2, 4]  # what the user spelled is text
    messages[2]["content"] = "world"
    (rendered,), _ = render_jinja_template(
        [messages], chat_template=TEMPLATE, add_generation_prompt=True, bos_token=BEGIN, eos_token=END
    )
    oracle = Oracle.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode_chat(messages) == oracle.encode(rendered, add_special_tokens=False).ids


def test_the_last_answer_is_continued_before_its_end(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hell" + END + "x"}]
    ids = tokenizer.encode_chat(messages)
    assert tokenizer.decode(ids) == f"{BEGIN}{USER}a{ASSISTANT}hell{END}x"
    assert ids[:5] == [FIRST + 3, FIRST + 1, RANKS[b"a"], FIRST + 2, RANKS[b"hell"]] and FIRST not in ids


def test_what_stands_before_a_text_to_be_continued(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    oracle = Oracle.from_file(str(tmp_path / "tokenizer.json"))
    assert [*tokenizer.prefix_ids, *tokenizer.encode("hello")] == oracle.encode("hello").ids
    assert tokenizer.prefix_ids == [FIRST + 3]


def test_no_end_of_text_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no end of text of its own") as caught:
        ChatTokenizer.from_dir(write(tmp_path, **files(eos_token=None)))
    assert "fetch" not in str(caught.value).lower()
