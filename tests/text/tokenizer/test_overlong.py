"""Texts that no context holds are refused after their first slices, with a number that is about right."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.errors import RequestError
from qwenrt.text.chat.builtin_templates import TEMPLATES
from qwenrt.text.chat.chatml import build_chat
from qwenrt.text.chat.template_format import TemplateFormat
from qwenrt.text.template.sandbox import JinjaTemplate
from qwenrt.text.tokenizer.overlong import Overlong
from qwenrt.text.tokenizer.slices import AT_ONCE
from qwenrt.text.tokenizer.tokenizer import Tokenizer


@settings(deadline=None)
@given(text=st.text(" \n\t1ab\u0301\u4f60<|\ud800", max_size=60), most=st.integers(-3, 20))
def test_only_what_has_more_tokens_is_refused(tokenizer: Tokenizer, text: str, most: int) -> None:
    exact = tokenizer.encode(text)
    try:
        assert tokenizer.encode(text, most=most) == exact
    except Overlong as error:
        assert len(exact) > most and error.tokens == len(exact) and error.characters == len(text)


@pytest.mark.parametrize(
    "unit", ["The answer is 42.\n", "\u4f60\u597d\uff0c", "e\u0301", "\u0301", "a", " ", "7", "<|im_end|>"]
)
def test_how_many_there_are_is_about_right(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (8 * AT_ONCE // len(unit))
    with pytest.raises(Overlong) as raised:
        tokenizer.encode(text, most=1000)
    exact = len(tokenizer.encode(text))
    assert abs(raised.value.tokens - exact) < 0.05 * exact and raised.value.characters == len(text)
    assert isinstance(raised.value, RequestError) and f"about {raised.value.tokens} tokens" in str(
        raised.value
    )
    assert copy.copy(raised.value).tokens == raised.value.tokens


def test_of_a_conversation_all_is_counted(tokenizer: Tokenizer) -> None:
    chat = TemplateFormat(JinjaTemplate(TEMPLATES["qwen3"], "qwen3"))
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": f"{n} small words " * 40} for n in range(41)]
    exact = len(chat.prompt(tokenizer, messages).token_ids)
    assert len(chat.prompt(tokenizer, messages, most=exact).token_ids) == exact
    for most in (0, 100, exact // 2):
        with pytest.raises(Overlong) as raised:
            chat.prompt(tokenizer, messages, most=most)
        assert abs(raised.value.tokens - exact) < 0.1 * exact


def test_turns_that_are_left_out_anyway_are_not_counted(tokenizer: Tokenizer) -> None:
    long = ("long " * 4000, "Yes.")
    ids = build_chat(tokenizer, "q", [("a", "b")], "s", 100)
    assert build_chat(tokenizer, "q", [long, ("a", "b")], "s", 100, most=200) == ids
    with pytest.raises(Overlong):
        build_chat(tokenizer, "q", [long, ("a", "b")], "s", most=200)
    with pytest.raises(Overlong):
        build_chat(tokenizer, "long " * 4000, [], "s", 100, most=200)
