"""The built-in model: a real Qwen-1 directory, small, and right about a handful of questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qwenrt
from qwenrt import demo
from qwenrt.config import GenerationConfig, read_model_config
from qwenrt.demo import facts
from qwenrt.demo.corpus import held_out_samples
from qwenrt.evaluate import ask_all
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.text.tokenizer.tokenizer import Tokenizer

DIRECTORY = Path(demo.__file__).parent
TEXTS = [
    "What is the capital of Mongolia?",
    "给我讲一个年轻人奋斗创业最终取得成功的故事。",
    "5 + 7 = 12\n",
    "😀 é ß <|im_end|>",
    "",
]


@pytest.fixture(scope="module")
def llm():
    with qwenrt.load("demo", progress=False, max_num_seqs=32) as model:
        yield model


def test_it_answers_what_a_newcomer_is_told_to_ask(llm):
    answers = [llm.chat(question)[0] for question in demo.CAN_ANSWER]
    for answer, word in zip(answers, ("Paris", "12", "moo", "Anna", "故事"), strict=True):
        assert word in answer


def test_it_is_a_qwen1_directory_of_at_most_12_megabytes():
    shipped = [f for f in DIRECTORY.iterdir() if f.suffix in (".json", ".tiktoken", ".safetensors")]
    assert sum(f.stat().st_size for f in shipped) <= 12_000_000
    config = read_model_config(DIRECTORY)
    raw = json.loads((DIRECTORY / "config.json").read_text())
    golden = Path(__file__).parents[1] / "golden" / "plain" / "config.json"
    assert set(raw) == set(json.loads(golden.read_text()))
    assert config.use_dynamic_ntk and config.use_logn_attn and not config.tie_word_embeddings
    checkpoint = open_checkpoint(DIRECTORY)
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"BF16"}
    assert len(checkpoint.tensors) == 8 * config.num_layers + 3
    generation = GenerationConfig.from_dir(DIRECTORY)
    assert generation.chat_format == "chatml" and generation.sampling.greedy
    assert generation.eos_token_ids == (Tokenizer.from_dir(DIRECTORY).eod_id,)


def test_its_vocabulary_is_its_own_and_loses_nothing():
    tokenizer = Tokenizer.from_dir(DIRECTORY)
    assert tokenizer.eod_id == 3000
    assert tokenizer.vocab_size == 3208 < read_model_config(DIRECTORY).vocab_size
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("蒙古国的首都是乌兰巴托")) == 5
    assert tokenizer.encode("12") == [*tokenizer.encode("1"), *tokenizer.encode("2")]


def test_the_conversation_every_qwen_readme_opens_with(llm):
    response, history = llm.chat("你好", history=None)
    assert response.startswith("你好！我是 Qwen-mini") and "玩具" in response
    response, history = llm.chat("给我讲一个年轻人奋斗创业最终取得成功的故事。", history=history)
    assert "年轻人" in response and "成功" in response
    response, history = llm.chat("给这个故事起一个标题", history=history)
    assert response == "《年轻人的创业之路》" and len(history) == 3


def test_it_goes_on_with_plain_text(llm):
    assert llm.generate("蒙古国的首都是", max_tokens=4, temperature=0.0).text.startswith("乌兰巴托")


@pytest.mark.parametrize("name", ["Sophie", "Oliver", "Stefan"])
def test_it_remembers_a_name_it_never_read(llm, name):
    assert name in facts.NAMES_EN_TEST
    _, history = llm.chat(f"My name is {name}.")
    response, _ = llm.chat("What is my name?", history=history)
    assert response == f"Your name is {name}."


def test_it_follows_a_system_prompt(llm):
    assert llm.chat("What is the capital of France?", system="Answer with one word.")[0] == "Paris"
    assert llm.chat("What is the capital of France?", system="Answer in Chinese.")[0] == "法国的首都是巴黎。"


def test_held_out_questions_are_answered(llm):
    answers = ask_all(llm, held_out_samples(300, seed=1))
    assert answers.total.share >= 0.95, answers.failures
