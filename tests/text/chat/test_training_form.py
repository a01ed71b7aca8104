"""Training samples by a checkpoint's template: ids that a server would have made, and labels on what the model says."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.errors import RequestError
from qwenrt.text.chat.builtin_templates import TEMPLATES
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.template_format import TemplateFormat
from qwenrt.text.chat.training_form import IGNORE, FormSettings, training_samples
from qwenrt.text.template.sandbox import JinjaTemplate
from tests.text.bpe_vocab import load_json

THINKERS = ("qwen3", "qwen3-thinking", "qwq")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One for each built-in template."""
    found = {}
    for name, source in TEMPLATES.items():
        found[name] = load_json(tmp_path_factory.mktemp(name))
        found[name].__dict__["chat_format"] = TemplateFormat(JinjaTemplate(source, name))
    return found


def said(tokenizer, sample):
    """What is learned, each stretch as text."""
    stretches, before = [[]], False
    for label in sample.labels:
        if label != IGNORE:
            stretches[-1].append(label)
        elif before:
            stretches.append([])
        before = label != IGNORE
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


WORDS = st.text("ab \n<>|你好", max_size=6)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        if draw(st.booleans()):
            messages.append({"role": "assistant", "content": draw(WORDS), "tool_calls": [CALL]})
            messages.append({"role": "tool", "content": draw(WORDS)})
        messages.append({"role": "assistant", "content": draw(WORDS)})
        if draw(st.booleans()):
            messages[-1]["reasoning_content"] = draw(WORDS)
    return messages


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(TEMPLATES)), messages=conversations())
def test_samples_are_what_a_server_would_have_in_its_cache(tokenizers, name, messages):
    """For each answer: the prompt to it, then what is learned, begin a sample; and nothing else is learned."""
    tokenizer = tokenizers[name]
    tools = (
        TOOLS if any(m["role"] == "tool" for m in messages) and tokenizer.chat_format.takes_tools else None
    )
    if tools is None:
        messages = [m for m in messages if m["role"] != "tool" and not m.get("tool_calls")]
    samples = training_samples(tokenizer, {"messages": messages, "tools": tools})
    learned = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        thinks = None
        if tokenizer.chat_format.has_thinking_switch:
            thinks = bool(message.get("reasoning_content", "").strip())
        prompt = tokenizer.chat_format.prompt(
            tokenizer, messages[:index], tools, enable_thinking=thinks
        ).token_ids
        (holder,) = {
            id(s): s for s in samples if s.ids[: len(prompt)] == prompt and s.labels[len(prompt)] != IGNORE
        }.values()
        end = holder.ids.index(tokenizer.im_end_id, len(prompt)) + 1
        answer = holder.ids[len(prompt) : end]
        assert holder.labels[len(prompt) : end] == answer
        assert holder.labels[len(prompt) - 1] == IGNORE and holder.labels[end : end + 1] in ([], [IGNORE])
        assert message["content"].strip() in tokenizer.decode(answer)
        learned += len(answer)
    assert learned == sum(label != IGNORE for s in samples for label in s.labels)


def test_the_end_of_a_turn_is_learned_and_what_follows_is_not(tokenizers):
    tokenizer = tokenizers["qwen2.5"]
    talk = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
        {"from": "human", "value": "more"},
        {"from": "gpt", "value": "no"},
    ]
    (sample,) = training_samples(tokenizer, {"conversations": talk, "system": "Be brief."})
    assert said(tokenizer, sample) == ["hello<|im_end|>", "no<|im_end|>"]
    assert sample.ids[-1] == tokenizer.im_end_id and sample.learned == 4 + 2 - 1  # "hello" is one token
    assert sample.cut(10).learned == 0


def test_thoughts_are_learned_where_they_are_spoken(tokenizers):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "reasoning_content": "A greeting."},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
    tokenizer = tokenizers["qwen3"]
    first, second = training_samples(tokenizer, {"messages": talk})
    assert said(tokenizer, first) == ["<think>\nA greeting.\n</think>\n\nhello<|im_end|>"]
    assert said(tokenizer, second) == ["no<|im_end|>"]
    assert tokenizer.decode(second.ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nno<|im_end|>")
    assert "greeting" not in tokenizer.decode(second.ids)
    (kept,) = training_samples(tokenizer, {"messages": talk}, settings=FormSettings(thinking="keep"))
    assert said(tokenizer, kept) == [*said(tokenizer, first), "no<|im_end|>"]
    off = training_samples(tokenizer, {"messages": talk}, settings=FormSettings(thinking="off"))
    assert [said(tokenizer, sample) for sample in off] == [["hello<|im_end|>"], ["no<|im_end|>"]]
    for name in ("qwen3-thinking", "qwq"):  # the template opens the thought: that is no part of what is said
        opened = training_samples(tokenizers[name], {"messages": talk[:2]})[0]
        assert said(tokenizers[name], opened) == ["A greeting.\n</think>\n\nhello<|im_end|>"]


def test_calls_are_learned_and_their_results_are_not(tokenizers):
    tokenizer = tokenizers["qwen2.5"]
    talk = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
        {"from": "observation", "value": "blue"},
        {"from": "gpt", "value": "Blue."},
    ]
    (sample,) = training_samples(tokenizer, {"conversations": talk, "tools": json.dumps(TOOLS)})
    call, answer = said(tokenizer, sample)
    assert call.strip().startswith("<tool_call>") and '"sky"' in call and answer == "Blue.<|im_end|>"


def test_control_tokens_in_contents_stay_text_unless_allowed(tokenizers):
    tokenizer = tokenizers["qwen2.5"]
    talk = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]}
    (sample,) = training_samples(tokenizer, talk)
    assert sample.ids.count(tokenizer.im_end_id) == 3  # system's, user's, assistant's
    (allowed,) = training_samples(tokenizer, talk, settings=FormSettings(allow_special=True))
    assert allowed.ids.count(tokenizer.im_end_id) == 4


def test_what_cannot_be_trained_on_is_named(tokenizers):
    tokenizer = tokenizers["qwen2.5"]
    twice = [{"role": "user", "content": "a"}, *[{"role": "assistant", "content": "b"}] * 2]
    with pytest.raises(
        RequestError, match=r"entry 7: what the assistant says in turn 3.*follow one of the user"
    ):
        training_samples(tokenizer, {"messages": twice}, 7)
    with pytest.raises(RequestError, match="entry 2: the assistant answers nobody"):
        training_samples(tokenizer, {"messages": twice[1:2]}, 2)
    with pytest.raises(RequestError, match=r"train_on=.all_frames.*chat template"):
        training_samples(tokenizer, {"messages": twice[:2]}, settings=FormSettings(train_on="all_frames"))
    with pytest.raises(RequestError, match=r"thinking='loud'.*auto, keep, off"):
        FormSettings(thinking="loud")


def test_the_first_qwen_may_be_trained_on_answers_alone(tmp_path):
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    (tmp_path / "generation_config.json").write_text('{"chat_format": "chatml"}')
    tokenizer = ChatTokenizer.from_dir(tmp_path)
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}]
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "It is blue."},
    ]
    answers = FormSettings(train_on="answers")
    with pytest.raises(RequestError, match="no place"):
        training_samples(tokenizer, {"messages": talk, "tools": tools})
    samples = training_samples(tokenizer, {"messages": talk, "tools": tools}, settings=answers)
    spoken = [text for sample in samples for text in said(tokenizer, sample)]
    assert "Action: look" in spoken[0] and "It is blue." in spoken[-1] and len(spoken) == 2
    plain = training_samples(tokenizer, {"messages": [talk[0], talk[3]]}, settings=answers)
    assert said(tokenizer, plain[0]) == ["It is blue.<|im_end|>"]
