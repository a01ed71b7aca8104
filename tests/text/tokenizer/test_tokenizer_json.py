"""The pipeline of a tokenizer.json: Qwen's spellings of it give the ids of tokenizers, others are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Oracle

from qwenrt.text.tokenizer.tokenizer_json import KNOWN_PATTERNS
from tests.text.bpe_vocab import (
    BYTE_LEVEL,
    FIRST,
    MERGES,
    form,
    load_json,
    refused,
    small_json,
    write,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"post_processor": None},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
        {"model__ignore_merges": True},
        {"model__merges": [f"{form(a)} {form(b)}" for a, b in MERGES]},
        {"pre_tokenizer__pretokenizers__0__pattern": {"Regex": KNOWN_PATTERNS[1]}},
        {
            "post_processor": {
                "type": "Sequence",
                "processors": [
                    BYTE_LEVEL,
                    {
                        "type": "TemplateProcessing",
                        "single": [
                            {"Sequence": {"id": "A", "type_id": 0}},
                            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                        ],
                        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                        "special_tokens": {
                            "<|endoftext|>": {
                                "id": "<|endoftext|>",
                                "ids": [FIRST],
                                "tokens": ["<|endoftext|>"],
                            }
                        },
                    },
                ],
            }
        },
        {"normalizer": None},
    ],
)
def test_pipelines_that_qwen_has(tmp_path: Path, changes: dict[str, Any]) -> None:
    ours = load_json(tmp_path, **changes)
    oracle = Oracle.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("hello  world\n\n12 你好 e\u0301 \u0e01\u0e34\u0e01 कि<|im_end|>", "I'LL ", ""):
        assert ours.encode(text, allow_special=True) == oracle.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == oracle.decode(ours.encode(text))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model": None}, "model: a JSON NoneType, not an object"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model.type: 'WordPiece', not 'BPE'"),
        ({"model": {"type": "Unigram", "vocab": []}}, "model.type: 'Unigram', not 'BPE'"),
        ({"model": {"vocab": {}}}, "model.type: None, not 'BPE'"),
        ({"model__vocab": []}, "model.vocab: a JSON list, not an object"),
        ({"model__merges": {}}, "model.merges: a JSON dict, not a list"),
        ({"model__merges": [["a"]]}, r"model.merges\[0\]: \['a'\] is not a pair"),
        ({"model__dropout": 0.1}, "model.dropout: 0.1, which no Qwen has"),
        ({"model__unk_token": "<unk>"}, "model.unk_token: '<unk>', which"),
        ({"model__byte_fallback": True}, "model.byte_fallback: True, which"),
        ({"model__end_of_word_suffix": "</w>"}, "model.end_of_word_suffix: '</w>', which"),
        ({"model__ignore_merges": "x"}, "model.ignore_merges: 'x', not true or false"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer: 'NFKC', not NFC"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
            r"normalizers\[0\]: 'Lowercase'",
        ),
        ({"normalizer": {"type": "Sequence"}}, r"normalizer.normalizers: a JSON NoneType, not a list"),
        ({"normalizer": "NFC"}, r"normalizer: a JSON str, not an object"),
        ({"pre_tokenizer": None}, "pre_tokenizer: a JSON NoneType, not an object"),
        ({"pre_tokenizer": BYTE_LEVEL}, r"pre_tokenizer: ByteLevel, not Split \+ ByteLevel"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer: Metaspace, not Split"),
        ({"pre_tokenizer__pretokenizers__1": {"type": "Digits"}}, r"pre_tokenizer: Split \+ Digits, not"),
        ({"pre_tokenizer__pretokenizers__1__add_prefix_space": True}, r"add_prefix_space: True, not false"),
        (
            {"pre_tokenizer__pretokenizers__1": {"type": "ByteLevel", "add_prefix_space": False}},
            r"use_regex: None, not",
        ),
        (
            {"pre_tokenizer__pretokenizers__0__behavior": "Removed"},
            "behavior 'Removed', invert False, not 'Isolated'",
        ),
        ({"pre_tokenizer__pretokenizers__0__invert": True}, "behavior 'Isolated', invert True"),
        (
            {"pre_tokenizer__pretokenizers__0__pattern": {"Regex": r"\w+"}},
            r"w\+'\} is none of the 2 known ones",
        ),
        ({"pre_tokenizer__pretokenizers__0__pattern": {"String": " "}}, "is none of the 2"),
        ({"pre_tokenizer__pretokenizers__0__pattern": {"Regex": []}}, "is none of the 2"),
        ({"decoder": None}, "decoder: None, not ByteLevel"),
        ({"decoder": {"type": "Metaspace"}}, "decoder: 'Metaspace', not ByteLevel"),
        ({"post_processor": {"type": "BertProcessing"}}, "post_processor: 'BertProcessing', not ByteLevel"),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]}},
            "post_processor: a template with the unknown piece",
        ),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}] * 2}},
            "post_processor: a template with the text 2 times, not once",
        ),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [], "special_tokens": {}}},
            "post_processor: a template with the text 0 times, not once",
        ),
        ({"added_tokens": {"x": 1}}, "added_tokens: a JSON dict, not a list"),
    ],
)
def test_other_pipelines_are_named(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    refused(write(tmp_path, tokenizer_json=small_json(**changes)), f"tokenizer.json, .*{found}")
