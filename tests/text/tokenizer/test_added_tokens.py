"""Added tokens: which files list them, where they are found in a text, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Oracle

from qwenrt.text.tokenizer.tokenizer import Tokenizer
from tests.text.bpe_vocab import (
    CONTROL,
    FIRST,
    MERGES,
    RANKS,
    SHOWN,
    added_tokens,
    load_json,
    pair_of,
    refused,
    small_json,
    tokenizer_config,
    tokenizer_json,
    vocab_json,
    write,
)


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
    assert tokenizer.encode("abc") == [401]  # a word, in whosever text
    assert tokenizer.vocab_size == 403 and 399 in tokenizer.unused_ids()


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
    assert Tokenizer.from_dir(directory).encode(text, allow_special=True) == oracle.encode(text).ids


def test_added_tokens_json_knows_no_flags(tmp_path: Path) -> None:
    listed = {f: FIRST + i for i, f in enumerate([*CONTROL, *SHOWN])}
    tokenizer = Tokenizer.from_dir(pair_of(tmp_path, added_tokens_json=listed))
    assert tokenizer.added_tokens == listed
    assert list(tokenizer.special_tokens) == CONTROL


def test_tokenizer_config_completes_tokenizer_json(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_json=tokenizer_json(RANKS, MERGES, added_tokens(FIRST, [])))
    assert Tokenizer.from_dir(tmp_path).token_id("<think>") is None
    write(tmp_path, tokenizer_config_json=tokenizer_config(FIRST, eos={"content": "<|endoftext|>"}))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.token_id("</think>") == FIRST + 25 and tokenizer.eos_token_id == FIRST


def test_control_tokens_may_stand_in_the_vocabulary(tmp_path: Path) -> None:
    inside = {**vocab_json(RANKS), **{f: FIRST + i for i, f in enumerate(CONTROL[:3])}, "▁x y": 400}
    tokenizer = Tokenizer.from_dir(
        pair_of(tmp_path, vocab_json=inside | {"▁x y": 400}, added_tokens_json={"▁x y": 400})
    )
    assert tokenizer.im_end_id == FIRST + 2 and FIRST + 2 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.decode([400]) == "▁x y"


def test_an_ordinary_token_may_be_listed_as_added(tmp_path: Path) -> None:
    listed = {"id": RANKS[b"hello"], "content": "hello", "special": False}
    tokenizer = load_json(tmp_path, added_tokens=[*added_tokens(FIRST), listed])
    assert tokenizer.encode("hello") == tokenizer.encode("hello", allow_special=True) == [RANKS[b"hello"]]


def entry(token_id: Any, content: Any, **flags: Any) -> dict[str, Any]:
    around = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"id": token_id, "content": content, "special": False, "normalized": False, **around, **flags}


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
        (entry(500, "x", lstrip="no"), r"lstrip is 'no'\. It must be true or false"),
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
        (
            {"tokenizer_config_json": {"eos_token": 3}},
            r"eos_token: it is 3\. It must be the content of a token",
        ),
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
            r"do not include <\|endoftext\|> and <\|im_start\|> and <\|im_end\|>, and it names no end of text",
        ),
        (
            {"added_tokens_json": {"<|im_start|>": 400, "<|endoftext|>": 401}},
            r"its 2 added tokens do not include <\|im_end\|>, and .* Every Qwen has these",
        ),
    ],
)
def test_refuses_other_lists(tmp_path: Path, files: dict[str, Any], found: str) -> None:
    if "tokenizer_config_json" in files:  # json.dumps writes a lone surrogate as an escape
        files = {"tokenizer_config_json": json.dumps(files["tokenizer_config_json"])}
    refused(pair_of(tmp_path, **files), found)


# ---- words: added tokens that are no control tokens are found in anybody's text


WORD = FIRST + 26  # the first id after those of Qwen3's added tokens


def oracle_of(directory: Path) -> Oracle:
    oracle = Oracle.from_file(str(directory / "tokenizer.json"))
    oracle.encode_special_tokens = True  # control tokens stay text, as far as the file calls them special
    return oracle


def test_a_word_is_one_token_in_any_text_and_a_control_token_none(tmp_path: Path) -> None:
    words = ["Zirconium", "<gene_42>", "[GENE]", "量子点", "\t\t", "im_start"]
    added = [*added_tokens(FIRST), *(entry(WORD + i, word) for i, word in enumerate(words))]
    tokenizer = load_json(tmp_path, added_tokens=added)
    text = "aZirconium, <gene_42>[GENE]量子点x\t\ty<|im_start|>"
    ids = tokenizer.encode(text)
    # im_start is inside a control token's form
    assert [i - WORD for i in ids if i >= WORD] == [0, 1, 2, 3, 4]
    assert ids == oracle_of(tmp_path).encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    spelled = "".join([*CONTROL, *SHOWN])
    assert not set(tokenizer.encode(spelled)) & set(range(FIRST, FIRST + 26))


def test_what_counts_as_a_control_token(tmp_path: Path) -> None:
    """Special tokens, <|...|>, the family's tags, what tokenizer_config.json names, what the chat template writes."""
    forms = [
        "<|x|>",
        "<｜x｜>",
        "<end>",
        "<pad>",
        "<more>",
        "<turn>",
        "<tool>",
        "<word>",
        "<think >",
        "content",
    ]
    added = [*added_tokens(FIRST), *(entry(400 + i, form) for i, form in enumerate(forms))]
    names = {"eos_token": "<end>", "pad_token": {"content": "<pad>"}, "additional_special_tokens": ["<more>"]}
    directory = write(
        tmp_path,
        tokenizer_json=small_json(added_tokens=added),
        tokenizer_config_json=names,
        chat_template_jinja="<turn>{{ messages[0].content }}",
    )
    write(directory / "additional_chat_templates", tool_use_jinja="{{ '<tool>' ~ messages[0].content }}")
    tokenizer = Tokenizer.from_dir(directory)
    assert [i for i in tokenizer.encode("".join(forms)) if i >= 400] == [407, 408, 409]
    assert [f for f in forms if f in tokenizer.special_tokens] == ["<end>", "<pad>", "<more>"]
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")  # refused where somebody chats, not here
    assert Tokenizer.from_dir(tmp_path).encode("<turn>") == [405]


@pytest.mark.parametrize("says", ["tokenizer.json", "tokenizer_config.json"])
def test_a_token_is_special_where_either_file_says_so(tmp_path: Path, says: str) -> None:
    """Tools write one of the two anew; a control token must not become a word, found in anybody's text."""
    form = "TURN"  # whose shape tells nothing
    inner, outer = (
        entry(400, form, special=says == name) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    directory = write(
        tmp_path,
        tokenizer_json=small_json(added_tokens=[*added_tokens(FIRST), inner]),
        tokenizer_config_json={"added_tokens_decoder": {"400": outer}},
    )
    tokenizer = Tokenizer.from_dir(directory)
    assert 400 not in tokenizer.encode(form) and tokenizer.encode(form, allow_special=True) == [400]
    assert tokenizer.decode([400], skip_special_tokens=True) == ""


def test_tags_of_thoughts_and_calls_stay_in_an_answer_whatever_a_file_calls_them(tmp_path: Path) -> None:
    """Fine-tunes add them as special tokens. Without them an answer's thought would never end."""
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    entries = [e | {"special": e["special"] or e["content"] in tags} for e in added_tokens(FIRST)]
    directory = write(
        tmp_path,
        tokenizer_json=small_json(added_tokens=entries),
        tokenizer_config_json={"additional_special_tokens": tags},
    )
    tokenizer = Tokenizer.from_dir(directory)
    ids = tokenizer.encode(text := "<think>a</think>b<tool_call>c</tool_call><|im_end|>", allow_special=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>")
    assert not set(map(tokenizer.token_id, tags)) & set(tokenizer.encode(text))


FLAGS = st.fixed_dictionaries(
    {name: st.booleans() for name in ("lstrip", "rstrip", "single_word", "normalized")}
)
WORDS = ["ab", "abc", "b c", "й", "aи\u0306b", "<|x|>", " c"]  # the last begins in what another takes along


@settings(deadline=None, max_examples=150)
@given(
    st.lists(FLAGS, min_size=len(WORDS), max_size=len(WORDS)),
    st.text(alphabet="abc йи\u0306\n\t\u3000_x1你<|>\u200d²", max_size=24),
    st.booleans(),
)
@example(
    [{"lstrip": False, "rstrip": True, "single_word": False, "normalized": True}] * len(WORDS),
    "ab c c ab",
    True,
)
@example(
    [{"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}] * len(WORDS),
    "aи\u0306b",
    False,
)
def test_words_are_found_as_tokenizers_finds_them(
    tmp_path_factory: pytest.TempPathFactory, flags: list[dict[str, bool]], text: str, composes: bool
) -> None:
    directory = tmp_path_factory.mktemp("words")
    added = [
        *added_tokens(FIRST),
        *(
            entry(WORD + i, word, special=word == "<|x|>") | flag
            for i, (word, flag) in enumerate(zip(WORDS, flags, strict=True))
        ),
    ]
    normalizer = {"type": "NFC"} if composes else None
    tokenizer = load_json(directory, added_tokens=added, normalizer=normalizer)
    assert tokenizer.encode(text) == oracle_of(directory).encode(text, add_special_tokens=False).ids
