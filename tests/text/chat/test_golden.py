"""Token ids recorded from the reference, and a second tokenizer that reads the same vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwenrt.text.chat.chatml import build_chat
from qwenrt.text.tokenizer.tokenizer import Tokenizer

TABLE: list[tuple[str, list[int]]] = [
    ("\n", [198]),
    ("\n\n", [271]),
    ("\n\n\n", [1406]),
    ("\r\n", [319]),
    ("system", [8948]),
    ("user", [872]),
    ("assistant", [77091]),
    ("You are a helpful assistant.", [2610, 525, 264, 10950, 17847, 13]),
    ("Human:", [33975, 25]),
    ("Observation:", [37763, 367, 25]),
    ("Observation:\n", [37763, 367, 510]),
    ("\nObservation:", [198, 37763, 367, 25]),
    ("Thought:", [84169, 25]),
    ("Action:", [2512, 25]),
    ("Final Answer:", [19357, 21806, 25]),
    ("A", [32]),
    ("D", [35]),
    (" A", [362]),
    (" B", [425]),
    (" C", [356]),
    (" D", [422]),
    ("1234567", [16, 17, 18, 19, 20, 21, 22]),
    ("Hello world", [9707, 1879]),
    ("  leading", [220, 6388]),
    ("x   y", [87, 256, 379]),
    ("   ", [262]),
    ("I'm", [40, 2776]),
    ("I'M", [40, 27603]),
    ("é", [963]),
    ("e\u0301", [963]),
    ("👍", [144349]),
    ("½", [26062]),
    ("Ⅷ", [70467, 100]),
    ("你好", [108386]),
    ("我是一只猫", [35946, 99639, 91680, 100472]),
    ("问题：", [86119, 5122]),
    ("答案：", [102349, 5122]),
    ("Panda", [47, 9817]),
    (" Panda", [72410]),
    ("Pandas", [47, 55433]),
    (" Pandas", [33506, 300]),
    ('print("<|endoftext|>")', [1350, 9639, 91, 8691, 723, 427, 91, 82598]),
    ("<|im_end|>", [27, 91, 318, 6213, 91, 29]),
    ("def f(x):\n    return x+1\n", [750, 282, 2075, 982, 262, 470, 856, 10, 16, 198]),
]


@pytest.mark.parametrize(("text", "ids"), TABLE)
def test_known_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids


def test_recorded_texts(tokenizer: Tokenizer, golden: Any) -> None:
    assert len(golden["texts"]) == 21
    for case in golden["texts"]:
        assert tokenizer.encode(case["text"]) == case["ids_ordinary"]
        assert tokenizer.encode(case["text"], allow_special=True) == case["ids_special_allowed"]
        assert tokenizer.decode(case["ids_special_allowed"]) == case["decoded"]
        assert tokenizer.decode(case["ids_ordinary"]) == case["decoded"]


def test_recorded_chats(tokenizer: Tokenizer, golden: Any) -> None:
    assert len(golden["chats"]) == 5
    for case in golden["chats"]:
        ids = build_chat(tokenizer, case["query"], case["history"], case["system"], case["max_window_size"])
        assert ids == case["ids"]
        assert tokenizer.decode(ids) == case["raw_text"]


def test_the_released_vocabulary(released_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(released_dir)
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (
        151643,
        151644,
        151645,
    )
    assert tokenizer.special_tokens["<|extra_204|>"] == 151850
    assert (tokenizer.vocab_size, len(tokenizer), len(tokenizer.special_ids)) == (
        151851,
        151851,
        208,
    )
    assert tokenizer.token_bytes(0) == b"!"
    assert tokenizer.token_bytes(188) == b"\0"


def test_agrees_with_another_tokenizer(tokenizer: Tokenizer) -> None:
    oracle = pytest.importorskip("dashscope.tokenizers.qwen_tokenizer")
    module_dir = Path(oracle.__file__).parents[1]
    other = oracle.QwenTokenizer(str(module_dir / "resources" / "qwen.tiktoken"))
    texts = [
        "for i in range(10):\n\tprint(i)\r\n\r\n    # done  \n",
        "混合 mixed 文本，with 1234 numbers & ünïcödé — 😀👩‍👩‍👧‍👦 \u0301",
        " \u3000 \u00a0\n \t\n x  !\n\n\n?  \n",
        "\x1c\x1d \x1e\x1f\x85\u2028\u200b\ufeff" * 3,
    ]
    for text in texts:
        assert tokenizer.encode(text, allow_special=True) == other.encode(text)
        assert tokenizer.decode(other.encode(text)) == other.decode(other.encode(text))
