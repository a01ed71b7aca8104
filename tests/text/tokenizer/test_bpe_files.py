"""tokenizer.json, vocab.json + merges.txt and qwen.tiktoken: the same ids from each, and what is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Oracle

from qwenrt.errors import CheckpointError, ConfigError, QwenrtError, RequestError
from qwenrt.text.tokenizer.merges import FORMS_OF_BYTES
from qwenrt.text.tokenizer.tokenizer import Tokenizer
from qwenrt.text.tokenizer.vocabulary import read_base_vocab
from tests.text.bpe_vocab import (
    CONTROL,
    FIRST,
    MERGES,
    RANKS,
    SHOWN,
    load_json,
    merges_of,
    merges_txt,
    pair_of,
    refused,
    small_json,
    tokenizer_config,
    tokenizer_json,
    vocab_json,
    write,
)
from tests.text.small_vocab import vocab_lines

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
    return {name: Tokenizer.from_dir(directory) for name, directory in released.items()}


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
    first = loaded["tokenizer.json"]  # the others give what is recorded as well: the oracle is asked once
    chats = [oracle.encode(case["raw_text"]).ids for case in golden["chats"]]
    for tokenizer in loaded.values():
        assert tokenizer.vocab_size == len(tokenizer) == 151669
        for case in golden["texts"]:
            assert tokenizer.encode(case["text"]) == case["ids_ordinary"]
            assert tokenizer.decode(case["ids_ordinary"]) == case["decoded"]
            if "<|extra_" not in case["text"]:
                assert tokenizer.encode(case["text"], allow_special=True) == case["ids_special_allowed"]
                if tokenizer is first:
                    check_against(oracle, tokenizer, case["text"])
        for case, ids in zip(golden["chats"], chats, strict=True):
            assert tokenizer.encode(case["raw_text"], allow_special=True) == ids


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
        assert other.vocab_size == 151669
    eos = [other.eos_token_id for other in loaded.values()]
    assert eos == [151645] * 3


# ---- a small vocabulary, in every spelling


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
    tokenizer = Tokenizer.from_dir(pair_of(tmp_path, merges_txt=merges))
    assert tokenizer.encode("hello 你好") == [RANKS[b"hello"], RANKS[b" "], RANKS["你好".encode()]]
    assert tokenizer.added_tokens == {f: FIRST + i for i, f in enumerate(CONTROL[:3])}
    assert tokenizer.eos_token_id is None


def test_the_first_merge_may_begin_with_a_hash(tmp_path: Path) -> None:
    ranks = {**{bytes([byte]): byte for byte in range(256)}, b"##": 256}
    tokenizer = Tokenizer.from_dir(write(tmp_path, vocab_json=vocab_json(ranks), merges_txt="# #\n"))
    assert tokenizer.encode("##") == [256]


def test_which_files_count(tmp_path: Path) -> None:
    """tokenizer.json before vocab.json before qwen.tiktoken; only a Qwen-1 model has Qwen-1's control tokens."""
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(vocab_lines(RANKS)))
    assert Tokenizer.from_dir(tmp_path).token_id("<|extra_0|>") == FIRST + 3
    write(tmp_path, config_json={"model_type": "qwen2"})
    assert Tokenizer.from_dir(tmp_path).special_tokens == {f: FIRST + i for i, f in enumerate(CONTROL[:3])}
    pair_of(
        tmp_path,
        added_tokens_json={**dict.fromkeys(CONTROL[:3]), **{f: 500 + i for i, f in enumerate(CONTROL)}},
    )
    assert Tokenizer.from_dir(tmp_path).im_end_id == 502
    write(tmp_path, tokenizer_json=tokenizer_json(RANKS, MERGES))
    assert Tokenizer.from_dir(tmp_path).im_end_id == FIRST + 2
    write(tmp_path, config_json={"model_type": "qwen"})
    assert Tokenizer.from_dir(tmp_path).token_id("<|extra_0|>") == FIRST + 3
    (tmp_path / "config.json").unlink()
    assert Tokenizer.from_dir(tmp_path).token_id("<think>") is not None
    with pytest.raises(RequestError, match="1 vocabulary extensions given"):
        Tokenizer.from_dir(tmp_path, ["x.tiktoken"])


def test_ranks_that_were_cut_off(tmp_path: Path, released_vocab: Path) -> None:
    """A qwen.tiktoken of a later generation: its length must agree with the ids of the added tokens."""
    write(tmp_path, config_json={"model_type": "qwen3"}, tokenizer_config_json=tokenizer_config(FIRST))
    lines = vocab_lines(RANKS)
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    assert Tokenizer.from_dir(tmp_path).token_id("<think>") == FIRST + 24
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines[:-1]))
    refused(
        tmp_path,
        r"it holds 272 tokens, the first added token is 273\. The file is truncated",
        CheckpointError,
    )
    (tmp_path / "tokenizer_config.json").unlink()
    released = released_vocab.read_bytes().splitlines(keepends=True)
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(released[:100_000]))
    refused(tmp_path, "it holds 100000 tokens, the first added token is 100000", CheckpointError)


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


# ---- damage


def test_tokens_that_no_merge_makes_are_decoded_only(tmp_path: Path) -> None:
    vocab = {**vocab_json(RANKS), "hey": 500, "abc": 501}
    tokenizer = load_json(tmp_path, model__vocab=vocab)
    assert tokenizer.encode("hey") == [RANKS[b"he"], RANKS[b"y"]]
    assert tokenizer.decode([500]) == "hey" and tokenizer.vocab_size == 502 and 499 in tokenizer.unused_ids()
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
    for name in ("tokenizer.json", "vocab.json"):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        refused(tmp_path, rf"{name}")
        (tmp_path / name).unlink()


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
        tokenizer = Tokenizer.from_dir(directory)
    except (ConfigError, CheckpointError) as error:
        assert str(directory) in str(error) and error.remedy and len(str(error)) < 1000
        return
    text = "hello world, 你好<think>\n\n<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text
    assert not tokenizer.special_ids & set(tokenizer.encode(text))


def test_hostile_text_ends(loaded: dict[str, Tokenizer]) -> None:
    for unit in ("<", "<|", "<think", "<think>", "</", " ", "\u0315\u0300", "<|im_start|>"):
        text = unit * (200_000 // len(unit))
        assert loaded["tokenizer.json"].encode(text, allow_special=True)


def test_byte_forms_are_those_of_the_oracle() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(FORMS_OF_BYTES) == sorted(ByteLevel.alphabet())
