"""tokenizer.json, vocab.json + merges.txt and qwen.tiktoken: the same ids from each, and what is refused."""

from __future__ import annotations

import copy
import json
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Oracle

from qwenrt.errors import CheckpointError, ConfigError, QwenrtError, RequestError
from qwenrt.text.bpe_merges import FORMS_OF_BYTES
from qwenrt.text.tokenizer import Tokenizer, load_tokenizer
from qwenrt.text.tokenizer_json import KNOWN_PATTERNS
from qwenrt.text.vocabulary import read_base_vocab
from tests.text.bpe_vocab import (
    BYTE_LEVEL,
    CONTROL,
    SHOWN,
    added_tokens,
    form,
    merges_of,
    merges_txt,
    small_bpe_ranks,
    tokenizer_config,
    tokenizer_json,
    vocab_json,
    write,
)
from tests.text.small_vocab import vocab_lines

RANKS = small_bpe_ranks()
MERGES = merges_of(RANKS)
FIRST = len(RANKS)  # id of <|endoftext|> in the small vocabulary
ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [*CONTROL[:3], *SHOWN, "<|im_", "<think", "\u0338", "e\u0301", "\u212b", "가", "\u1100\u1161"]
        ),
        st.sampled_from([" ", "\t", "\n", "\r\n", "\u3000", "😀", "👩‍👩‍👧"]).flatmap(
            lambda unit: st.integers(1, 70).map(lambda n: unit * n)
        ),
    ),
    max_size=8,
).map("".join)


# ---- the released vocabulary, in every spelling


@pytest.fixture(scope="module")
def released(released_vocab: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories with the real 151643 tokens and what Qwen3 adds to them."""
    root = tmp_path_factory.mktemp("released")
    ranks = read_base_vocab(released_vocab)
    merges = merges_of(ranks)
    assert len(merges) == len(ranks) - 256
    config = tokenizer_config(len(ranks))
    whole = tokenizer_json(ranks, merges)
    ranks_only = write(root / "tiktoken", tokenizer_config_json=config, config_json={"model_type": "qwen3"})
    (ranks_only / "qwen.tiktoken").write_bytes(released_vocab.read_bytes())
    return {
        "tokenizer.json": write(root / "json", tokenizer_json=whole, tokenizer_config_json=config),
        "vocab.json": write(
            root / "pair",
            vocab_json=vocab_json(ranks),
            merges_txt=merges_txt(merges),
            tokenizer_config_json=config,
        ),
        "qwen.tiktoken": ranks_only,
    }


@pytest.fixture(scope="module")
def loaded(released: dict[str, Path]) -> dict[str, Tokenizer]:
    tokenizers = {}
    for name, directory in released.items():
        start = time.process_time()
        tokenizers[name] = load_tokenizer(directory)
        seconds = time.process_time() - start
        assert seconds < 5, f"{name}: {seconds:.2f} s"  # 1.1 s on an idle core
    return tokenizers


@pytest.fixture(scope="module")
def oracle(released: dict[str, Path]) -> Oracle:
    return Oracle.from_file(str(released["tokenizer.json"] / "tokenizer.json"))


def check_against(oracle: Oracle, ours: Tokenizer, text: str) -> None:
    assert ours.encode(text, allow_special=True) == oracle.encode(text, add_special_tokens=False).ids
    oracle.encode_special_tokens = True  # control tokens as text; the others stay tokens there
    try:
        if not any(form in text for form in SHOWN):
            assert ours.encode(text) == oracle.encode(text, add_special_tokens=False).ids
    finally:
        oracle.encode_special_tokens = False


def test_all_files_give_the_recorded_ids(loaded: dict[str, Tokenizer], golden: Any, oracle: Oracle) -> None:
    for tokenizer in loaded.values():
        assert tokenizer.vocab_size == len(tokenizer) == 151669
        for case in golden["texts"]:
            assert tokenizer.encode(case["text"]) == case["ids_ordinary"]
            assert tokenizer.decode(case["ids_ordinary"]) == case["decoded"]
            if "<|extra_" not in case["text"]:
                assert tokenizer.encode(case["text"], allow_special=True) == case["ids_special_allowed"]
                check_against(oracle, tokenizer, case["text"])
        for case in golden["chats"]:
            assert (
                tokenizer.encode(case["raw_text"], allow_special=True) == oracle.encode(case["raw_text"]).ids
            )


@settings(deadline=None, max_examples=200)
@given(ANY_TEXT)
def test_all_files_give_the_ids_of_the_oracle(
    loaded: dict[str, Tokenizer], oracle: Oracle, text: str
) -> None:
    first = loaded["tokenizer.json"]
    check_against(oracle, first, text)
    ordinary, special = first.encode(text), first.encode(text, allow_special=True)
    assert not set(first.added_tokens.values()) & set(ordinary)
    assert first.decode(ordinary) == unicodedata.normalize("NFC", text)
    assert first.decode(special, skip_special_tokens=True) == oracle.decode(special, skip_special_tokens=True)
    for other in loaded.values():
        assert other.encode(text) == ordinary and other.encode(text, allow_special=True) == special


def test_every_id_is_the_same_token(
    loaded: dict[str, Tokenizer], tokenizer: Tokenizer, oracle: Oracle
) -> None:
    for other in loaded.values():
        assert all(other.token_bytes(i) == tokenizer.token_bytes(i) for i in range(151643))
        assert {form: oracle.token_to_id(form) for form in other.added_tokens} == other.added_tokens
        assert len(other.added_tokens) == 26
        assert list(other.special_tokens) == CONTROL
        assert (other.eod_id, other.im_start_id, other.im_end_id) == (151643, 151644, 151645)
        assert (other.token_id("<think>"), other.token_id("</think>")) == (151667, 151668)
        assert other.token_id("<|extra_0|>") is None
        assert not other.has_token(151669)
    eos = [other.eos_token_id for other in loaded.values()]
    assert eos == [151645] * 3


# ---- a small vocabulary, in every spelling


def pair_of(directory: Path, **files: Any) -> Path:
    return write(directory, **{"vocab_json": vocab_json(RANKS), "merges_txt": merges_txt(MERGES), **files})


def small_json(**changes: Any) -> dict[str, Any]:
    file = copy.deepcopy(tokenizer_json(RANKS, MERGES))
    for name, value in changes.items():
        place: Any = file
        *path, last = name.split("__")
        for key in path:
            place = place[int(key) if key.isdigit() else key]
        place[int(last) if last.isdigit() else last] = value
    return file


def load_json(directory: Path, **changes: Any) -> Tokenizer:
    return load_tokenizer(write(directory, tokenizer_json=small_json(**changes)))


def refused(directory: Path, found: str, error: type[QwenrtError] = ConfigError) -> None:
    with pytest.raises(error, match=found) as caught:
        load_tokenizer(directory)
    assert caught.value.remedy and str(directory) in str(caught.value)


def test_user_text_is_never_an_added_token(tmp_path: Path) -> None:
    tokenizer = load_json(tmp_path)
    text = "<think>hello</think><tool_call><|im_end|>"
    assert not set(tokenizer.added_tokens.values()) & set(tokenizer.encode(text))
    ids = tokenizer.encode(text, allow_special=True)
    ends = [tokenizer.token_id(f) for f in ("<think>", "</think>", "<tool_call>", "<|im_end|>")]
    assert ids == [ends[0], RANKS[b"hello"], *ends[1:]]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>")


def test_longest_form_first_and_leftmost(tmp_path: Path) -> None:
    added = [
        *added_tokens(FIRST),
        *(
            {"id": 400 + i, "content": f, "special": False, "normalized": False}
            for i, f in enumerate(["ab", "abc", "cd"])
        ),
    ]
    tokenizer = load_json(tmp_path, added_tokens=added)
    assert tokenizer.encode("abcd", allow_special=True) == [401, RANKS[b"d"]]
    assert tokenizer.encode("xabd", allow_special=True) == [RANKS[b"x"], 400, RANKS[b"d"]]
    assert tokenizer.encode("ab", allow_special=True) == [400]
    assert tokenizer.encode("abc") == [RANKS[b"a"], RANKS[b"b"], RANKS[b"c"]]
    assert tokenizer.vocab_size == 403 and not tokenizer.has_token(399)


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="ae\u0301\u0338é>≯<", max_size=30))
def test_forms_are_found_before_or_after_composing(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """`>` followed by U+0338 composes to another character: a token that ends there is found only before that."""
    added = [
        *added_tokens(FIRST),
        *(
            {
                "id": FIRST + 26 + i,
                "content": f,
                "special": False,
                "normalized": n,
                "lstrip": False,
                "rstrip": False,
            }
            | {"single_word": False}
            for i, (f, n) in enumerate([("<a>", False), ("ae\u0301", True), ("é<", False), (">e", True)])
        ),
    ]
    directory = tmp_path_factory.getbasetemp() / "composing"
    if not directory.exists():
        write(directory, tokenizer_json=small_json(added_tokens=added))
    oracle = Oracle.from_file(str(directory / "tokenizer.json"))
    assert load_tokenizer(directory).encode(text, allow_special=True) == oracle.encode(text).ids


@pytest.mark.parametrize(
    "merges",
    [
        merges_txt(MERGES),
        merges_txt(MERGES).removeprefix("#version: 0.2\n"),
        merges_txt(MERGES).replace("\n", "\r\n"),
        "\ufeff" + merges_txt(MERGES) + "\n\n",
    ],
)
def test_spellings_of_merges_txt(tmp_path: Path, merges: str) -> None:
    tokenizer = load_tokenizer(pair_of(tmp_path, merges_txt=merges))
    assert tokenizer.encode("hello 你好") == [RANKS[b"hello"], RANKS[b" "], RANKS["你好".encode()]]
    assert tokenizer.added_tokens == {f: FIRST + i for i, f in enumerate(CONTROL[:3])}
    assert tokenizer.eos_token_id is None


def test_the_first_merge_may_begin_with_a_hash(tmp_path: Path) -> None:
    ranks = {**{bytes([byte]): byte for byte in range(256)}, b"##": 256}
    tokenizer = load_tokenizer(write(tmp_path, vocab_json=vocab_json(ranks), merges_txt="# #\n"))
    assert tokenizer.encode("##") == [256]


def test_which_files_count(tmp_path: Path) -> None:
    """tokenizer.json before vocab.json before qwen.tiktoken; only a Qwen-1 model has Qwen-1's control tokens."""
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(vocab_lines(RANKS)))
    assert load_tokenizer(tmp_path).token_id("<|extra_0|>") == FIRST + 3
    write(tmp_path, config_json={"model_type": "qwen2"})
    assert load_tokenizer(tmp_path).special_tokens == {f: FIRST + i for i, f in enumerate(CONTROL[:3])}
    pair_of(
        tmp_path,
        added_tokens_json={**dict.fromkeys(CONTROL[:3]), **{f: 500 + i for i, f in enumerate(CONTROL)}},
    )
    assert load_tokenizer(tmp_path).im_end_id == 502
    write(tmp_path, tokenizer_json=tokenizer_json(RANKS, MERGES))
    assert load_tokenizer(tmp_path).im_end_id == FIRST + 2
    write(tmp_path, config_json={"model_type": "qwen"})
    assert load_tokenizer(tmp_path).token_id("<|extra_0|>") == FIRST + 3
    (tmp_path / "config.json").unlink()
    assert load_tokenizer(tmp_path).token_id("<think>") is not None
    with pytest.raises(RequestError, match="1 vocabulary extensions given"):
        Tokenizer.from_dir(tmp_path, ["x.tiktoken"])


def test_no_files(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"neither tokenizer\.json, nor vocab\.json with merges\.txt, nor qwen\.tiktoken",
        CheckpointError,
    )
    refused(tmp_path / "gone", "neither", CheckpointError)
    write(tmp_path, vocab_json=vocab_json(RANKS))
    refused(tmp_path, r"merges\.txt: no such file", CheckpointError)
    (tmp_path / "vocab.json").rename(tmp_path / "merges.txt")
    refused(tmp_path, r"vocab\.json: no such file")


# ---- added tokens


def test_added_tokens_json_knows_no_flags(tmp_path: Path) -> None:
    listed = {f: FIRST + i for i, f in enumerate([*CONTROL, *SHOWN])}
    tokenizer = load_tokenizer(pair_of(tmp_path, added_tokens_json=listed))
    assert tokenizer.added_tokens == listed
    assert list(tokenizer.special_tokens) == CONTROL


def test_tokenizer_config_completes_tokenizer_json(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_json=tokenizer_json(RANKS, MERGES, added_tokens(FIRST, [])))
    assert load_tokenizer(tmp_path).token_id("<think>") is None
    write(tmp_path, tokenizer_config_json=tokenizer_config(FIRST, eos={"content": "<|endoftext|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_id("</think>") == FIRST + 25 and tokenizer.eos_token_id == FIRST


def test_control_tokens_may_stand_in_the_vocabulary(tmp_path: Path) -> None:
    inside = {**vocab_json(RANKS), **{f: FIRST + i for i, f in enumerate(CONTROL[:3])}, "▁x y": 400}
    tokenizer = load_tokenizer(
        pair_of(tmp_path, vocab_json=inside | {"▁x y": 400}, added_tokens_json={"▁x y": 400})
    )
    assert tokenizer.im_end_id == FIRST + 2 and FIRST + 2 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.decode([400]) == "▁x y"


def test_an_ordinary_token_may_be_listed_as_added(tmp_path: Path) -> None:
    listed = {"id": RANKS[b"hello"], "content": "hello", "special": False}
    tokenizer = load_json(tmp_path, added_tokens=[*added_tokens(FIRST), listed])
    assert tokenizer.encode("hello") == tokenizer.encode("hello", allow_special=True) == [RANKS[b"hello"]]


def entry(token_id: Any, content: Any, **flags: Any) -> dict[str, Any]:
    return {"id": token_id, "content": content, "special": False, "normalized": False, **flags}


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (
            entry(FIRST, "x"),
            rf"added_tokens\[26\]: 'x' has id {FIRST}, but that is the id of '<\|endoftext\|>'",
        ),
        (entry(500, "<think>"), rf"added_tokens\[26\]: '<think>' has id 500, but {FIRST + 24} elsewhere"),
        (entry(5, "<x>"), r"id 5 of the added token '<x>' is that of the ordinary token b'\\x05'"),
        (entry(500, "hello"), r"ordinary token 259 is spelled like the added token 'hello' \(500\)"),
        (
            entry(259, "hello", special=True),
            r"ordinary token 259 is spelled like the added token 'hello' \(259\)",
        ),
        (entry(2**21, "x"), r"added_tokens\[26\]: id 2097152 of 'x' is not 0 to 2097151"),
        (entry(10**300, "x"), r"id 1000.* of 'x' is not"),
        (entry(-1, "x"), r"id -1 of 'x' is not"),
        (entry("500", "x"), r"id '500' of 'x' is not"),
        (entry(True, "x"), r"id True of 'x' is not"),
        (entry(None, "x"), r"id None of 'x' is not"),
        (entry(500, ""), r"content ''\. It must be 1 to 256 characters"),
        (entry(500, "x" * 257), r"content 'xxx.*It must be 1 to 256 characters"),
        (entry(500, None), r"has no content"),
        (entry(500, 3), r"has no content"),
        ("x", r"added_tokens\[26\]: 'x' has no content"),
        ([], r"\[\] has no content"),
        (entry(500, "x", lstrip=True), r"'x' has lstrip true"),
        (entry(500, "x", rstrip=True), r"'x' has rstrip true"),
        (entry(500, "x", single_word=True), r"'x' has single_word true"),
        (entry(500, "x", special="no"), r"special is 'no'\. It must be true or false"),
    ],
)
def test_refuses_added_tokens(tmp_path: Path, more: Any, found: str) -> None:
    refused(
        write(tmp_path, tokenizer_json=tokenizer_json(RANKS, MERGES, [*added_tokens(FIRST), more])), found
    )


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            {"tokenizer_config_json": {"added_tokens_decoder": {"x": {"content": "x"}}}},
            r"decoder\['x'\]: id 'x' of",
        ),
        (
            {"tokenizer_config_json": {"added_tokens_decoder": {"-1": {"content": "x"}}}},
            r"decoder\['-1'\]: id '-1' of",
        ),
        (
            {"tokenizer_config_json": {"added_tokens_decoder": {"9" * 99: {"content": "x"}}}},
            r"id '9+'?\.* of",
        ),
        (
            {"tokenizer_config_json": {"added_tokens_decoder": {"500": "x"}}},
            r"decoder\['500'\]: 'x' has no content",
        ),
        (
            {"tokenizer_config_json": {"added_tokens_decoder": [1]}},
            r"added_tokens_decoder: a JSON list, not an object",
        ),
        ({"tokenizer_config_json": {"eos_token": 3}}, r"eos_token: it is 3\. It must be the form of a token"),
        ({"tokenizer_config_json": {"eos_token": ["x"]}}, r"eos_token: it is \['x'\]"),
        ({"tokenizer_config_json": {"eos_token": {"id": 3}}}, r"eos_token: it is \{'id': 3\}"),
        (
            {"tokenizer_config_json": {"eos_token": "</s>"}},
            r"eos_token: '</s>' is no token of this vocabulary \(273",
        ),
        ({"tokenizer_config_json": {"eos_token": "\ud800"}}, r"eos_token: '.ud800' is no token"),
        ({"added_tokens_json": {"<|im_end|>": "x"}}, r"added_tokens\.json, '<\|im_end\|>': id 'x'"),
        (
            {"added_tokens_json": {"<think>": 400}},
            r"do not include <\|endoftext\|> and <\|im_start\|> and <\|im_end\|>",
        ),
        (
            {"added_tokens_json": {"<|im_start|>": 400, "<|endoftext|>": 401}},
            r"its 2 added tokens do not include <\|im_end\|>\. Every Qwen has these",
        ),
    ],
)
def test_refuses_other_lists(tmp_path: Path, files: dict[str, Any], found: str) -> None:
    if "tokenizer_config_json" in files:  # json.dumps writes a lone surrogate as an escape
        files = {"tokenizer_config_json": json.dumps(files["tokenizer_config_json"])}
    refused(pair_of(tmp_path, **files), found)


# ---- the pipeline of tokenizer.json


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
            "post_processor: a template that puts something before the text",
        ),
        ({"added_tokens": {"x": 1}}, "added_tokens: a JSON dict, not a list"),
    ],
)
def test_other_pipelines_are_named(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    refused(write(tmp_path, tokenizer_json=small_json(**changes)), f"tokenizer.json, .*{found}")


# ---- damage


def test_tokens_that_no_merge_makes_are_decoded_only(tmp_path: Path) -> None:
    vocab = {**vocab_json(RANKS), "hey": 500, "abc": 501}
    tokenizer = load_json(tmp_path, model__vocab=vocab)
    assert tokenizer.encode("hey") == [RANKS[b"he"], RANKS[b"y"]]
    assert tokenizer.decode([500]) == "hey" and tokenizer.vocab_size == 502 and not tokenizer.has_token(499)
    refused(
        write(tmp_path, tokenizer_json=small_json(model__vocab=vocab, model__ignore_merges=True)),
        "model.ignore_merges: true, but no merge makes b'hey'",
    )


def test_merges_that_lost_lines(tmp_path: Path) -> None:
    lines = merges_txt(MERGES).splitlines(keepends=True)
    refused(
        pair_of(tmp_path, merges_txt="".join(lines[:-1])),
        r"its \d+ merges end before token \d+ of vocab.json",
    )
    refused(
        pair_of(tmp_path, merges_txt="".join(lines[:5])), r"merges.txt: its 4 entries make 260 of 273 tokens"
    )
    refused(pair_of(tmp_path, merges_txt=lines[0]), r"its 0 entries make 256 of 273 tokens")
    refused(
        write(tmp_path, tokenizer_json=small_json(model__merges=[])), r"model.merges: its 0 entries make 256"
    )


def test_merges_and_vocabulary_of_different_models(tmp_path: Path) -> None:
    refused(
        pair_of(tmp_path, merges_txt="h e\nz z\n"),
        r"merges.txt, line 2: 'zz' of the pair 'z', 'z' is not in the",
    )
    refused(
        pair_of(tmp_path, merges_txt="#version: 0.2\n\nl l\nh e\n"),
        r"line 4: the pair 'h', 'e' makes id 256 after",
    )
    refused(pair_of(tmp_path, merges_txt="h e\nh\n"), r"merges.txt, line 2: 'h' is not a pair")
    (tmp_path / "merges.txt").write_bytes(b"h e\n\xff\xff")
    refused(tmp_path, r"merges.txt: byte 4 is not UTF-8", CheckpointError)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "an empty file"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a git-lfs pointer"),
        ("<!DOCTYPE html><html>login</html>", "an HTML page"),
    ],
)
def test_other_files_in_their_place(tmp_path: Path, content: str, found: str) -> None:
    for name in ("tokenizer_json", "vocab_json", "merges_txt", "tokenizer_config_json"):
        directory = tmp_path / name
        refused(pair_of(directory, **{name: content}), rf"{name[:3]}\w+\.(json|txt): {found}", QwenrtError)


@pytest.mark.parametrize(
    "content",
    ["[" * 10**6, "{" + '"a":{' * 10**5, "[]", "3", '{"model"', "{\xff}", '{"a": ' + "9" * 10**5 + "}"],
)
def test_json_that_is_none(tmp_path: Path, content: str) -> None:
    start = time.perf_counter()
    for name in ("tokenizer.json", "vocab.json"):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        refused(tmp_path, rf"{name}")
        (tmp_path / name).unlink()
    assert time.perf_counter() - start < 2


def test_files_beyond_the_limit(tmp_path: Path) -> None:
    pair_of(tmp_path)
    for name, error in (
        ("merges.txt", CheckpointError),
        ("vocab.json", ConfigError),
        ("tokenizer.json", ConfigError),
    ):
        with (tmp_path / name).open("wb") as file:
            file.truncate(64 * 2**20 + 1)
        refused(tmp_path, f"{name}: more than 67108864 bytes", error)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_damage_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Values of any kind anywhere in the three files: a tokenizer that works, or a typed error that names the place."""
    directory = tmp_path_factory.mktemp("damaged")
    files: dict[str, Any] = {"tokenizer_json": tokenizer_json(RANKS, MERGES)}
    if data.draw(st.booleans()):
        files = {"vocab_json": vocab_json(RANKS), "merges_txt": merges_txt(MERGES)}
    files["tokenizer_config_json"] = tokenizer_config(FIRST)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(files)))
        if isinstance(files[name], str):
            at = data.draw(st.integers(0, len(files[name])))
            files[name] = (
                files[name][:at]
                + data.draw(st.text(max_size=9))
                + files[name][at + data.draw(st.integers(0, 9)) :]
            )
            continue
        place, depth = files[name], data.draw(st.integers(0, 4))
        for _ in range(depth):
            inner = [
                v
                for v in (place.values() if isinstance(place, dict) else place)
                if isinstance(v, (dict, list)) and v
            ]
            place = data.draw(st.sampled_from(inner)) if inner else place
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        junk = st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=5),
            st.just([]),
            st.just({}),
        )
        place[data.draw(st.sampled_from(keys))] = data.draw(junk)
    write(directory, **{name: v if isinstance(v, str) else json.dumps(v) for name, v in files.items()})
    try:
        tokenizer = load_tokenizer(directory)
    except (ConfigError, CheckpointError) as error:
        assert str(directory) in str(error) and error.remedy and len(str(error)) < 1000
        return
    text = "hello world, 你好<think>\n\n<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text
    assert not tokenizer.special_ids & set(tokenizer.encode(text))


def test_hostile_text_takes_linear_time(loaded: dict[str, Tokenizer]) -> None:
    for unit in ("<", "<|", "<think", "<think>", "</", " ", "\u0315\u0300", "<|im_start|>"):
        text = unit * (200_000 // len(unit))
        start = time.process_time()
        ids = loaded["tokenizer.json"].encode(text, allow_special=True)
        seconds = time.process_time() - start
        assert ids and seconds < 2, f"{unit!r}: {seconds:.2f} s"


def test_byte_forms_are_those_of_the_oracle() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(FORMS_OF_BYTES) == sorted(ByteLevel.alphabet())
