"""Vocabulary files: what is read, what is refused and in which words."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.errors import CheckpointError
from qwenrt.text.tokenizer import vocabulary
from qwenrt.text.tokenizer.vocabulary import MAX_TOKEN_ID, MAX_VOCAB_BYTES, read_base_vocab, read_extra_vocab
from tests.text.small_vocab import small_ranks, vocab_lines


def read(path: Path, content: bytes) -> dict[bytes, int]:
    path.write_bytes(content)
    return read_base_vocab(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qwen.tiktoken"


def lines() -> list[bytes]:
    return vocab_lines(small_ranks())


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\n\n"])
def test_reads_lines(path: Path, newline: bytes) -> None:
    assert read(path, newline.join(lines()) + newline) == small_ranks()
    assert read(path, b"\xef\xbb\xbf" + newline.join(lines())) == small_ranks()  # a BOM from an editor


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"%%%= 9", r"'%%%=' is not base64"),
        (b"YQ 9", r"'YQ' is not base64"),  # padding missing
        (b"YR== 9", r"'YR==' is not base64"),  # bits left over
        (b"= 9", r"'=' is not base64"),
        (b"YQ==", r"1 fields in 'YQ==', expected `base64 rank`"),
        (b"YQ== 9 9", r"3 fields in 'YQ== 9 9', expected `base64 rank`"),
        (b"YQ== -1", r"rank '-1' is not an integer from 0 to 2097151"),
        (b"YQ== 1.5", r"rank '1.5' is not an integer"),
        (b"YQ== 99999999999999999999", r"rank '99999999999999999999' is not an integer"),
        (b"YQ== \xd9\xa1", r"is not an integer"),
        (b"YQ== 400", r"token b'a' occurs a second time \(first with rank 97\)"),
        (b"enp6 97", r"rank 97 occurs a second time \(first in line 98\)"),
        (b"enp6 300", r"rank 300 in a file of 272 tokens: rank 271 is missing"),
        (b"\x00\x01\x02", r"1 fields in"),
    ],
)
def test_refuses_a_bad_line(path: Path, line: bytes, found: str) -> None:
    assert len(lines()) == 271
    with pytest.raises(CheckpointError, match=r"qwen\.tiktoken, line 272: .*" + found) as error:
        read(path, b"\n".join([*lines(), line]))
    assert error.value.remedy == "Fetch the file again; it may be damaged or truncated."


def test_refuses_missing_bytes(path: Path) -> None:
    tokens = [bytes([b]) for b in range(256) if b not in (10, 200)]
    with pytest.raises(CheckpointError, match="2 of the 256 single bytes have no token, the first is 0x0a"):
        read(path, b"\n".join(vocab_lines({token: rank for rank, token in enumerate(tokens)})))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b" \n\n", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2561218\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html><html>login</html>", "an HTML page"),
        (b"x" * (MAX_VOCAB_BYTES + 1), f"more than {MAX_VOCAB_BYTES} bytes"),
    ],
)
def test_recognises_other_files(path: Path, content: bytes, found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        read(path, content)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file.*git lfs pull"):
        read_base_vocab(tmp_path / "qwen.tiktoken")
    with pytest.raises(CheckpointError, match="it is a directory, not a regular file"):
        read_base_vocab(tmp_path)


def test_a_line_that_is_repeated_a_million_times(path: Path) -> None:
    line = b"YQ== 97\n"
    with pytest.raises(CheckpointError, match="occurs a second time"):
        read(path, b"\n".join(lines()) + b"\n" + line * 1_000_000)


def test_extension_rules(tmp_path: Path) -> None:
    known, special = small_ranks(), range(271, 479)
    extra = tmp_path / "extra.tiktoken"
    entries = [
        (b"hello", 600),  # exists already
        (b"<|im_end|>", 601),  # a control token
        (b"taken", 5),  # the id of a regular token
        (b"taken too", 300),  # the id of a control token
        (b"new", 700),  # with a gap before it
        (b"again", 700),  # the id was just used
        (b"new", 701),  # exists by now
        (b"last", 480),
    ]
    extra.write_bytes(b"\n".join(base64.b64encode(t) + b" %d" % i for t, i in entries))
    read_extra_vocab(extra, known, {b"<|im_end|>"}, special)
    assert {t: i for t, i in known.items() if i >= 271} == {b"new": 700, b"last": 480}
    extra.write_bytes(b"bmV3 %d" % (MAX_TOKEN_ID + 1))
    with pytest.raises(CheckpointError, match=r"extra\.tiktoken, line 1: rank '2097152'"):
        read_extra_vocab(extra, known, (), special)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.integers(0, 5000), st.integers(0, 40))
def test_any_damage_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, cut: int
) -> None:
    """Bytes inserted into or cut out of a good file: a complete vocabulary or a CheckpointError, never else."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.tiktoken"
    good = b"\n".join(lines())
    at %= len(good)
    try:
        ranks = read(path, good[:at] + junk + good[at + cut :])
    except CheckpointError as error:
        assert "fuzzed.tiktoken" in str(error)
        assert error.remedy
        return
    assert sorted(ranks.values()) == list(range(len(ranks)))
    assert all(bytes([b]) in ranks for b in range(256))
    assert all(isinstance(token, bytes) and token for token in ranks)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=40))
def test_only_canonical_base64_is_read(tmp_path_factory: pytest.TempPathFactory, encoded: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "base64.tiktoken"
    path.write_bytes(encoded + b" 999")
    known: dict[bytes, int] = {}
    try:
        read_extra_vocab(path, known, (), ())
    except CheckpointError:
        return
    for token in known:
        assert binascii.b2a_base64(token, newline=False) in encoded


@settings(deadline=None, max_examples=60)
@given(
    at=st.integers(0, 3000),
    length=st.integers(0, 12),
    put=st.one_of(
        st.binary(max_size=3), st.sampled_from([b" ", b"\n", b"\r\n", b" \n", b"=", b"0", b"YQ== 271\n"])
    ),
)
def test_a_file_read_as_a_whole_is_as_read_line_by_line(
    tmp_path_factory: pytest.TempPathFactory, at: int, length: int, put: bytes
) -> None:
    whole = b"\n".join(lines()) + b"\n"
    at %= len(whole)
    changed = whole[:at] + put + whole[at + length :]
    path = tmp_path_factory.mktemp("changed") / "qwen.tiktoken"

    def outcome() -> tuple[object, str]:
        try:
            return list(read(path, changed).items()), ""
        except CheckpointError as error:
            return None, str(error)

    as_it_is = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "_ranks_in_order", lambda raw: None)
        assert outcome() == as_it_is
