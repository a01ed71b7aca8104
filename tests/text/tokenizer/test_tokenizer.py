"""Encoding and decoding, control tokens, hostile text, and what a model directory may hold."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.errors import CheckpointError, ConfigError, RequestError
from qwenrt.text.tokenizer import tokenizer as tokenizer_module
from qwenrt.text.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from qwenrt.text.tokenizer.unicode import nfc, without_surrogates
from tests.text.small_vocab import small_ranks, vocab_lines

MEGABYTE = 1_000_000
CONTROL = st.sampled_from([*SPECIAL_TOKENS[:5], "<|extra_205|>", "<|", "|>", "<|im_", "\n", " ", "\r\n"])
ANY_TEXT = st.lists(st.one_of(st.text(max_size=20), CONTROL), max_size=8).map("".join)


def write_model(directory: Path, ranks: dict[bytes, int] | None = None, **files: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "qwen.tiktoken").write_bytes(b"\n".join(vocab_lines(ranks or small_ranks())) + b"\n")
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


# ---- encoding


@settings(deadline=None, max_examples=200)
@given(ANY_TEXT)
def test_text_survives_and_never_becomes_control_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    special = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(special) == unicodedata.normalize("NFC", text)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 151850), max_size=40))
def test_decoding_is_the_bytes_joined(tokenizer: Tokenizer, ids: list[int]) -> None:
    joined = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert tokenizer.decode_bytes(ids) == joined
    assert tokenizer.decode(ids) == joined.decode("utf-8", "replace")
    assert tokenizer.decode(ids, errors="ignore") == joined.decode("utf-8", "ignore")
    plain = [i for i in ids if i < 151643]
    assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(plain)


def test_control_tokens_only_on_request(small: Tokenizer) -> None:
    text = "hello<|im_end|><|extra_205|><|endoftext|>"
    assert not small.special_ids & set(small.encode(text))
    ids = small.encode(text, allow_special=True)
    assert [i for i in ids if i in small.special_ids] == [small.im_end_id, small.eod_id]
    assert small.decode(ids) == text
    assert small.decode(ids, skip_special_tokens=True) == "hello<|extra_205|>"


def test_half_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(51461) == b" \xe6\xa0"
    assert tokenizer.decode([51461, 117]) == " 根"
    assert tokenizer.decode([51461]) == " \ufffd"
    assert tokenizer.decode([51461], errors="ignore") == " "
    with pytest.raises(RequestError, match="byte 1 is not UTF-8"):
        tokenizer.decode([51461], errors="strict")


def test_what_is_not_text_or_an_id(small: Tokenizer) -> None:
    for value in (None, b"x", 3):
        with pytest.raises(RequestError, match=rf"encoding text: got {type(value).__name__}\. Pass a str"):
            small.encode(value)  # type: ignore[arg-type]
    for unknown in (small.vocab_size, -1, 2**40):
        with pytest.raises(RequestError, match=rf"token id {unknown}: no such token, ids are 0 to 478"):
            small.decode([unknown])
    with pytest.raises(RequestError, match=r"token id 'a'\. Token ids are integers"):
        small.decode(["a"])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="errors='nonsense'"):
        small.decode([1], errors="nonsense")


def test_lone_surrogates_become_replacement_characters(small: Tokenizer) -> None:
    assert small.decode(small.encode("a\ud800b")) == "a\ufffdb"
    assert small.decode(small.encode("\ud83d\ude00")) == "😀"  # a pair is one character
    assert without_surrogates("x\udfff") == "x\ufffd"


@pytest.mark.parametrize(
    ("before", "unit", "after"),
    [
        ("", "a", ""),
        ("", " ", ""),
        ("x", " ", "x"),
        ("", "\t ", "\n  x"),
        ("", "\u3000", ""),
        ("", "\n", ""),
        ("", "!", ""),
        ("", "😀", ""),
        ("", "\0", ""),
        ("", "\ue000", ""),
        ("", "\ud800", ""),
        ("a", "\u0315\u0300", ""),
        ("", "<|im_start|>", ""),
        ("", "<|", ""),
    ],
)
def test_a_megabyte_ends(tokenizer: Tokenizer, before: str, unit: str, after: str) -> None:
    text = before + unit * (MEGABYTE // len(unit.encode("utf-8", "surrogatepass"))) + after
    assert len(tokenizer.encode(text, allow_special=True)) >= len(text) / 130  # quadratic would be minutes


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from([" ", "  ", "\t", "\u3000", "\x1f", "\n", "\r", "x", "1", "!", "'s", "é", "你"]))
)
def test_long_blank_runs_change_nothing(tokenizer: Tokenizer, parts: list[str]) -> None:
    """Runs encoded by themselves give the ids that the pattern gives: checked with runs of two counting as long."""
    text = "".join(parts)
    ids: list[int] = []
    start = 0
    for blanks in tokenizer_module._long_blanks(text, 2):
        ids += tokenizer._encoding.encode_ordinary(text[start : blanks.start])
        ids += tokenizer._encoding._encode_single_piece(text[blanks])
        start = blanks.stop
    ids += tokenizer._encoding.encode_ordinary(text[start:])
    assert ids == tokenizer._encoding.encode_ordinary(text)


@settings(deadline=None, max_examples=100)
@given(
    st.text(alphabet="ae\u0300\u0315\u0308\u0344\u0f71\u0f72\u0f73\u0f75\u0f81\u1100\u1161가你", max_size=200)
)
def test_long_runs_of_marks_compose_the_same(text: str) -> None:
    text *= 12
    assert nfc(text) == unicodedata.normalize("NFC", text)


def test_loading_and_encoding_need_no_torch() -> None:
    code = (
        "import sys, qwenrt.text.tokenizer.tokenizer, qwenrt.text.chat.chatml, qwenrt.text.tokenizer.detokenizer, "
        "qwenrt.text.replies.reply, qwenrt.text.chat.conversations\n"
        "print([m for m in ('torch', 'numpy', 'tiktoken') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- directories


def test_own_vocabulary_has_its_control_tokens_after_its_ranks(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_model(tmp_path, generation_config={"eos_token_id": 271}))
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (271, 272, 273)
    assert tokenizer.vocab_size == 479
    assert tokenizer.special_ids == frozenset(range(271, 479))
    assert tokenizer.encode("hello world") == [small_ranks()[b"hello"], small_ranks()[b" world"]]


@pytest.mark.parametrize("name", ["with space", "中文 目录", "v1.0..dots", "quote'\"name"])
def test_odd_directory_names(tmp_path: Path, name: str) -> None:
    assert Tokenizer.from_dir(write_model(tmp_path / name)).vocab_size == 479


def test_home_directory_and_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for file in directory.iterdir():
        file.chmod(0o444)
    directory.chmod(0o555)
    assert Tokenizer.from_dir("~/model").vocab_size == 479
    directory.chmod(0o755)


def write_extra(path: Path, token: bytes = b"extra word", token_id: int = 600) -> Path:
    path.write_bytes(base64.b64encode(token) + b" %d\n" % token_id)
    return path


def test_extension_by_default_name_config_and_argument(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "a")
    write_extra(directory / "qwen_extra.tiktoken")
    tokenizer = Tokenizer.from_dir(directory)
    assert (tokenizer.vocab_size, tokenizer.unused_ids()[-1]) == (601, 599)
    assert tokenizer.decode([600, tokenizer.eod_id], skip_special_tokens=True) == "extra word"
    with pytest.raises(RequestError, match="token id 599"):
        tokenizer.decode([599])
    named = write_model(tmp_path / "b", tokenizer_config={"extra_vocab_file": "mine.tiktoken"})
    write_extra(named / "mine.tiktoken", token_id=500)
    assert Tokenizer.from_dir(named).token_bytes(500)
    outside = write_extra(tmp_path / "elsewhere.tiktoken", token_id=550)
    assert Tokenizer.from_dir(named, extra_vocab_files=[outside]).token_bytes(550)


def test_extension_tokens_are_encoded(tmp_path: Path) -> None:
    directory = write_model(tmp_path)
    entries = {b"hello w": 900, b"hellow": 901, b"hellowo": 903}
    (directory / "qwen_extra.tiktoken").write_bytes(b"\n".join(vocab_lines(entries)))
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.encode("hellow") == [901]
    assert tokenizer.encode("hellowo") == [903]  # a piece that is a token is that token


@pytest.mark.parametrize("name", ["../x.tiktoken", "/etc/passwd", "a/b", "a\\b", "", "..", "C:x", 3, ["x"]])
def test_extension_must_be_a_plain_file_name(tmp_path: Path, name: Any) -> None:
    write_model(tmp_path, tokenizer_config={"extra_vocab_file": name})
    with pytest.raises(CheckpointError, match=r"extra_vocab_file is .* plain name of a file in the same"):
        Tokenizer.from_dir(tmp_path)


def test_named_extension_must_exist(tmp_path: Path) -> None:
    write_model(tmp_path, tokenizer_config={"extra_vocab_file": "gone.tiktoken"})
    with pytest.raises(CheckpointError, match=r"gone\.tiktoken: no such file"):
        Tokenizer.from_dir(tmp_path)


def test_broken_config_is_named(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        Tokenizer.from_dir(tmp_path)


def test_ordinary_token_spelled_like_a_control_token() -> None:
    ranks = {**small_ranks(), b"<|im_end|>": 271}
    with pytest.raises(CheckpointError, match=r"token 271 is spelled like the control token <\|im_end\|>"):
        Tokenizer(ranks)


@pytest.mark.parametrize("eos", [271, 273, [273], [273, 271], None])
def test_agreeing_end_of_text_ids(tmp_path: Path, eos: Any) -> None:
    assert Tokenizer.from_dir(write_model(tmp_path, generation_config={"eos_token_id": eos})).eod_id == 271


@pytest.mark.parametrize("eos", [151643, [151645, 151643], 270, "x", {"a": 1}])
def test_disagreeing_end_of_text_ids(tmp_path: Path, eos: Any) -> None:
    write_model(tmp_path, tokenizer_config={"eos_token_id": eos})
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_dir(tmp_path)
    text = str(error.value)
    assert "it holds 271 tokens, so <|endoftext|> is id 271" in text
    assert f"eos_token_id in tokenizer_config.json is {eos!r}" in text


@pytest.mark.parametrize("lost", [2, 50_000])
@pytest.mark.parametrize("config", ["{}", '{"eos_token_id": 151643}', '{"eos_token_id": [151645]}'])
def test_released_vocabulary_cut_off_at_a_line_end(
    released_dir: Path, tmp_path: Path, lost: int, config: str
) -> None:
    shutil.copytree(released_dir, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(whole[:-lost]))
    (tmp_path / "generation_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=f"holds {151643 - lost} tokens"):
        Tokenizer.from_dir(tmp_path)


def test_released_vocabulary_with_windows_line_ends(released_dir: Path, tmp_path: Path) -> None:
    lines = (released_dir / "qwen.tiktoken").read_bytes().splitlines()
    (tmp_path / "qwen.tiktoken").write_bytes(b"\r\n".join(lines) + b"\r\n")
    assert Tokenizer.from_dir(tmp_path).encode("你好") == [108386]
