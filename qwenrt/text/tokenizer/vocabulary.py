"""What a tokenizer is made of, and untrusted qwen.tiktoken files (lines of `base64(token) rank`)."""

from __future__ import annotations

import binascii
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qwenrt.errors import CheckpointError
from qwenrt.files import read_downloaded

MAX_VOCAB_BYTES = 16 * 2**20  # the released file has 2.5 MB
MAX_TOKEN_ID = 2**21 - 1  # tables are indexed by id, so an absurd id would be an absurd allocation
_FETCH_AGAIN = "Fetch the file again; it may be damaged or truncated."
FETCH_ALL_AGAIN = "Fetch the tokenizer's files again: they are damaged or from different models."
_INK = bytes(b for b in range(256) if not bytes([b]).isspace())
_BOM = b"\xef\xbb\xbf"
_FROM_LFS = (
    "The model directory is incomplete: this is one of its git-lfs files. "
    "Fetch it with `git lfs pull` or `qwenrt pull`."
)

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class AddedToken:
    """A token that no merge produces: its content stands for its id wherever control tokens are recognised.

    special: decoding with skip_special_tokens drops it (`<|im_end|>`; not `<think>`). control: it is part of a
    prompt's structure, so that its content in a text from outside stays text; the others are words, and are found in
    any text. normalized: it is looked for in the NFC form of a text, else in the text as written. lstrip, rstrip: it
    takes white space beside it along; single_word: it counts only where no word goes on beside it.
    """

    content: str
    id: int
    special: bool
    normalized: bool = False
    control: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """ranks: the tokens that merging produces, bytes -> id; the lower id is merged first. added: all others.

    unmerged: tokens that have an id but that no merge reaches: they are decoded, never encoded. pattern splits
    a text into the pieces that are merged one by one; nfc: composed before that. eos_token_id: what
    tokenizer_config.json names as the end of a text or turn. prefix_ids, suffix_ids: what tokenizer.json puts before
    and after a text that is to be embedded; suffix_ids is None where it has no template that says so.
    """

    ranks: Mapping[bytes, int]
    added: tuple[AddedToken, ...]
    unmerged: Mapping[bytes, int] = field(default_factory=dict)
    pattern: str = SPLIT_PATTERN
    nfc: bool = True
    eos_token_id: int | None = None
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] | None = None


def read_base_vocab(path: Path) -> dict[bytes, int]:
    """The ranks of a complete vocabulary: token bytes -> rank = token id, 0..n-1 without gaps.

    Raises CheckpointError naming the file, the line and what is wrong with it.
    """
    in_order = _ranks_in_order(read_limited(path, MAX_VOCAB_BYTES))
    if in_order is not None:
        return in_order
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for line, token, rank in _entries(path):
        if token in ranks:
            raise _bad(path, line, f"token {token!r} occurs a second time (first with rank {ranks[token]})")
        if rank in line_of_rank:
            raise _bad(path, line, f"rank {rank} occurs a second time (first in line {line_of_rank[rank]})")
        ranks[token] = rank
        line_of_rank[rank] = line
    for rank, line in line_of_rank.items():
        if rank >= len(ranks):
            gap = next(r for r in range(len(ranks)) if r not in line_of_rank)
            raise _bad(path, line, f"rank {rank} in a file of {len(ranks)} tokens: rank {gap} is missing")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise CheckpointError(
            f"reading {path}",
            f"{len(missing)} of the 256 single bytes have no token, the first is 0x{missing[0]:02x}",
            "Every text must be expressible: a Qwen vocabulary holds all single bytes. " + _FETCH_AGAIN,
        )
    return ranks


def _ranks_in_order(raw: bytes) -> dict[bytes, int] | None:
    """The ranks of a file as the released one is, with every line in order and in its shortest form, read as a whole
    because start-up waits for it; None for any other file, right or wrong."""
    text = raw if raw.endswith(b"\n") else raw + b"\n"
    last = b"%d" % (text.count(b"\n") - 1)
    if text[-16:-1].rpartition(b" ")[2] != last:  # told at once of most other files
        return None
    fields = text.split()
    encoded, digits = fields[::2], fields[1::2]
    if text.translate(None, _INK) != b" \n" * len(digits):
        return None
    if digits != [b"%d" % rank for rank in range(len(digits))]:
        return None
    try:
        tokens = [binascii.a2b_base64(field) for field in encoded]
    except ValueError:
        return None
    if [binascii.b2a_base64(token, newline=False) for token in tokens] != encoded:
        return None
    ranks = dict(zip(tokens, range(len(tokens)), strict=True))
    complete = len(ranks) == len(tokens) and all(bytes([b]) in ranks for b in range(256))
    return ranks if complete and b"" not in ranks else None


def read_extra_vocab(
    path: Path, known: dict[bytes, int], reserved: Collection[bytes], used: Collection[int]
) -> None:
    """Add a vocabulary extension to ``known`` in place. Ids may have gaps.

    A token that exists already (in ``known`` or ``reserved``) is skipped, and so is one whose id is taken (in
    ``used``, in ``known`` or by an earlier line).
    """
    taken = set(used) | set(known.values())
    for _, token, rank in _entries(path):
        if token in known or token in reserved or rank in taken:
            continue
        known[token] = rank
        taken.add(rank)


def _entries(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(line number from 1, token bytes, rank) of each line; blank lines are skipped, CRLF is fine."""
    for number, line in enumerate(read_limited(path, MAX_VOCAB_BYTES).splitlines(), 1):
        if not line or line.isspace():
            continue
        fields = line.split()
        if len(fields) != 2:
            raise _bad(path, number, f"{len(fields)} fields in {_shown(line)}, expected `base64 rank`")
        encoded, digits = fields
        try:
            token = binascii.a2b_base64(encoded)
        except ValueError:
            token = b""
        # Decoding skips foreign characters and stray bits: only what encodes back to the same is base64.
        if not token or binascii.b2a_base64(token, newline=False) != encoded:
            raise _bad(path, number, f"{_shown(encoded)} is not base64")
        if not digits.isdigit() or len(digits) > 9 or int(digits) > MAX_TOKEN_ID:
            raise _bad(path, number, f"rank {_shown(digits)} is not an integer from 0 to {MAX_TOKEN_ID}")
        yield number, token, int(digits)


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a vocabulary file, without a BOM. CheckpointError where it is missing or something else."""
    raw = read_downloaded(path, limit, CheckpointError, missing=_FROM_LFS, what="vocabulary file")
    return raw.removeprefix(_BOM)


def _bad(path: Path, line: int, found: str) -> CheckpointError:
    return CheckpointError(f"reading {path}, line {line}", found, _FETCH_AGAIN)


def _shown(raw: bytes) -> str:
    return repr(raw if len(raw) <= 60 else raw[:57] + b"...")[1:]
