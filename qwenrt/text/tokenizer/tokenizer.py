"""Text <-> token ids for every Qwen, over tiktoken. Control tokens written in a text stay text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qwenrt.arguments import as_integer, as_list, flag
from qwenrt.config import read_json
from qwenrt.errors import CheckpointError, RequestError, shown
from qwenrt.files import is_there
from qwenrt.text.tokenizer.added_tokens import AddedTokenFinder
from qwenrt.text.tokenizer.bpe_files import MERGES_FILE, TOKENIZER_FILE, VOCAB_FILE, read_bpe
from qwenrt.text.tokenizer.overlong import Overlong
from qwenrt.text.tokenizer.qwen1 import QWEN1_FILE, SPECIAL_TOKENS, read_qwen1, with_control_tokens
from qwenrt.text.tokenizer.slices import AT_ONCE, SPLIT_PLACE, slices
from qwenrt.text.tokenizer.unicode import nfc, without_surrogates
from qwenrt.text.tokenizer.vocabulary import END_OF_TEXT, IM_END, IM_START, SPLIT_PATTERN, Vocabulary

if TYPE_CHECKING:
    import tiktoken

__all__ = ["SPECIAL_TOKENS", "SPLIT_PATTERN", "TOKENIZER_FILES", "Tokenizer"]

# One of them is in every directory that has a tokenizer.
TOKENIZER_FILES = (TOKENIZER_FILE, VOCAB_FILE, QWEN1_FILE)

# Whitespace as the split pattern's \s understands it (re's own \s has four more), but for newlines.
_BLANK = "[\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_BLANKS, _EIGHT_BLANKS = re.compile(f"{_BLANK}+"), re.compile(f"{_BLANK}{{8}}")
_LONG_BLANKS = 4096
_A_TOKEN = 4  # characters, in the texts of most languages no more than that

_Kind = TypeVar("_Kind", bound="Tokenizer")


class Tokenizer:
    """Text to token ids and back. One object may be used by any number of threads.

    added_tokens: all tokens that no merge produces, content -> id; special_tokens: those among them that
    skip_special_tokens drops; special_ids: their ids as a set; control_tokens: finds those that structure prompts (see
    vocabulary.AddedToken). eod_id, im_start_id, im_end_id: the three that every Qwen has; a model with other control
    tokens has its own end of text and None for the two of turns. eos_token_id: the one that tokenizer_config.json
    names, or None. prefix_ids: ids put before a text that is to be continued; empty in every Qwen. vocab_size: largest
    id + 1; some ids below may have no token. directory: the one it was read from, if any.
    """

    def __init__(
        self, vocabulary: Vocabulary | Mapping[bytes, int], name: str = "qwen", directory: Path | None = None
    ) -> None:
        """``vocabulary``: what a reader returned, or the ranks 0..n-1 of a Qwen-1 vocabulary."""
        if isinstance(vocabulary, Mapping):
            vocabulary = with_control_tokens(vocabulary, name)
        self.name, self.directory = name, directory
        self.eos_token_id = vocabulary.eos_token_id
        self.prefix_ids = list(vocabulary.prefix_ids)
        self.suffix_ids = None if vocabulary.suffix_ids is None else list(vocabulary.suffix_ids)
        self.added_tokens = {token.content: token.id for token in vocabulary.added}
        self.special_tokens = {token.content: token.id for token in vocabulary.added if token.special}
        self.special_ids = frozenset(self.special_tokens.values())
        self.control_tokens = AddedTokenFinder(token for token in vocabulary.added if token.control)
        eod_id = self.special_tokens.get(END_OF_TEXT, vocabulary.eos_token_id)
        assert eod_id is not None  # read_added_tokens saw to it
        self.eod_id = eod_id
        self.im_start_id, self.im_end_id = map(self.special_tokens.get, (IM_START, IM_END))
        ordinary = {**vocabulary.unmerged, **vocabulary.ranks}
        self.vocab_size = max(max(ordinary.values()), *self.added_tokens.values()) + 1
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        for token, token_id in ordinary.items():
            self._bytes[token_id] = token
        for content, token_id in self.added_tokens.items():
            self._bytes[token_id] = content.encode()
        self._nfc = nfc if vocabulary.nfc else str
        self._as_written, self._composed = (
            AddedTokenFinder(token for token in vocabulary.added if token.normalized is normalized)
            for normalized in (False, True)
        )
        self._has_words = not all(token.control for token in vocabulary.added)
        self._encoding = _encoding(name, dict(vocabulary.ranks), vocabulary.pattern)
        # The encoder makes new integers for its ids. One object for each id takes a fifth of the memory, and lists of
        # them are copied and freed without a walk through it, which would keep other threads waiting.
        self._own_ids = list(range(self.vocab_size))

    @classmethod
    def from_dir(cls: type[_Kind], path: str | Path, extra_vocab_files: Sequence[str | Path] = ()) -> _Kind:
        """Read a model directory: tokenizer.json, or vocab.json with merges.txt, or qwen.tiktoken.

        A Qwen-1 directory (config.json says so, or there is qwen.tiktoken and no config.json) keeps to its
        qwen.tiktoken; only that one has extensions (``extra_vocab_files``, see qwen1.py). Raises
        CheckpointError or ConfigError naming the file.
        """
        directory = _directory(path)
        if is_qwen1(directory):
            return cls(read_qwen1(directory, extra_vocab_files), str(directory), directory)
        if extra_vocab_files:
            raise RequestError(
                f"loading the tokenizer of {directory}",
                f"{len(extra_vocab_files)} vocabulary extensions given",
                "Only a Qwen-1 vocabulary (qwen.tiktoken) can be extended by such files.",
            )
        return cls(read_bpe(directory), str(directory), directory)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, eod_id={self.eod_id})"

    def encode(self, text: str, allow_special: bool = False, most: int | None = None) -> list[int]:
        """The token ids of the text (of its NFC form, where the vocabulary asks for it). Linear in its length, and a
        piece at a time: other threads go on meanwhile.

        Words added to the vocabulary are found in every text. Control tokens spelled in it stay ordinary text unless
        ``allow_special``: only for text that no user wrote. Nothing is put before or after the text. Lone surrogates
        count as U+FFFD.

        most: raises Overlong for a text of clearly more tokens, and does not read it all for that.
        """
        if not isinstance(text, str):
            raise RequestError("encoding text", f"got {type(text).__name__}", "Pass a str.")
        if most is not None and len(text) > _A_TOKEN * most:
            self._check_room(text, most)
        text = without_surrogates(text)
        allow_special = flag("allow_special", allow_special)
        ids: list[int] = []
        if not allow_special and not self._has_words:
            self._add_ordinary(ids, self._nfc(text))
            return ids
        for written, added in _cut(self._as_written, text, not allow_special):
            for composed, inner in _cut(self._composed, self._nfc(written), not allow_special):
                self._add_ordinary(ids, composed)
                if inner is not None:
                    ids.append(inner)
            if added is not None:
                ids.append(added)
        return ids

    def token_id(self, content: str) -> int | None:
        """The id of an added token, such as <think>; None where this vocabulary has no such token."""
        return self.added_tokens.get(content) if isinstance(content, str) else None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False, errors: str = "replace") -> str:
        """The text of ``ids``: their bytes joined, then decoded as UTF-8 with any codec error handler.

        ``skip_special_tokens`` drops the control tokens and nothing else. Unknown ids raise RequestError.
        """
        try:
            codecs.lookup_error(errors)
        except (LookupError, TypeError, ValueError) as error:
            raise RequestError(
                "decoding",
                f"errors={shown(errors)}",
                "Use 'replace', 'ignore', 'strict' or a registered handler.",
            ) from error
        try:
            return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise RequestError(
                "decoding with errors='strict'",
                f"byte {error.start} is not UTF-8 ({error.reason})",
                "Use errors='replace': tokens may end in the middle of a character.",
            ) from error

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        """The bytes of ``ids`` joined; they need not be whole characters."""
        ids = as_list("token ids", ids)
        if flag("skip_special_tokens", skip_special_tokens):
            ids = (i for i in map(_index, ids) if i not in self.special_ids)
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; an added token's are its content."""
        index = _index(token_id)
        token = self._bytes[index] if 0 <= index < self.vocab_size else None
        if token is None:
            raise RequestError(
                f"decoding token id {shown(index)}",
                f"no such token, ids are 0 to {self.vocab_size - 1}",
                "Embedding rows past the vocabulary have no text and are never sampled.",
            )
        return token

    def turn_ids(self) -> tuple[int, int]:
        """The ids of <|im_start|> and <|im_end|>. RequestError where this model's turns are made of other tokens."""
        if self.im_start_id is None or self.im_end_id is None:
            raise RequestError(
                "building ChatML turns",
                f"the vocabulary of {self.name} has no {IM_START} and {IM_END}",
                "Let the model's own chat template build the prompt.",
            )
        return self.im_start_id, self.im_end_id

    def unused_ids(self) -> list[int]:
        """The ids below vocab_size that have no token."""
        return [i for i, token in enumerate(self._bytes) if token is None]

    def _check_room(self, text: str, most: int) -> None:
        """Raises Overlong where the text's slices, each by itself, have more than ``most`` tokens together."""
        tokens = 0
        for start in range(0, len(text), AT_ONCE):
            piece = text[start : start + AT_ONCE]
            tokens += len(self._encode_piece(self._nfc(without_surrogates(piece))))
            if tokens > most:
                raise Overlong(tokens * len(text) // (start + len(piece)), len(text))

    def _add_ordinary(self, ids: list[int], text: str) -> None:
        """Put the ids of a composed text without added tokens behind ``ids``."""
        own = self._own_ids.__getitem__
        for piece in slices(text, SPLIT_PLACE):
            if len(piece) <= 4 * AT_ONCE or _may_have_long_blanks(piece):
                ids.extend(map(own, self._encode_piece(piece)))
                continue
            # No place in it to cut it at: its ids come as numbers in memory, of which lists are made a part at a time.
            # The encoder counts them in bytes and calls that their number; as bytes they are what they are.
            raw = memoryview(self._encoding._core_bpe.encode_to_tiktoken_buffer(piece, set())).cast("B")
            found = raw.cast("I")
            for at in range(0, len(found), AT_ONCE):
                ids.extend(map(own, found[at : at + AT_ONCE]))

    def _encode_piece(self, text: str) -> list[int]:
        if not _may_have_long_blanks(text):
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for blanks in _long_blanks(text, _LONG_BLANKS):
            ids += self._encoding.encode_ordinary(text[start : blanks.start])
            ids += self._encoding._encode_single_piece(text[blanks])
            start = blanks.stop
        return ids + self._encoding.encode_ordinary(text[start:])


def _cut(finder: AddedTokenFinder, text: str, words_only: bool) -> Iterator[tuple[str, int | None]]:
    """(text before a token, the token's id) for each one found, then (the rest, None)."""
    end = 0
    for found in finder.find(text, words_only):
        yield text[end : found.start], found.id
        end = found.end
    yield text[end:], None


def _directory(path: object) -> Path:
    try:
        return Path(path).expanduser()  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:  # no path; no such home
        found = f"got {shown(path)}"
        raise RequestError("loading a tokenizer", found, "Pass the directory of a model.") from error


def _index(token_id: object) -> int:
    index = as_integer(token_id)
    if index is None:
        raise RequestError("decoding", f"token id {shown(token_id)}", "Token ids are integers.")
    return index


def is_qwen1(directory: Path) -> bool:
    """Whether the vocabulary has Qwen-1's control tokens, whose ids mean other tokens in later generations."""

    def there(name: str) -> bool:
        return is_there(directory / name, CheckpointError)

    has_ranks, has_others = there(QWEN1_FILE), any(map(there, (TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE)))
    if not has_ranks and not has_others:
        raise CheckpointError(
            f"loading the tokenizer of {directory}",
            f"there is neither {TOKENIZER_FILE}, nor {VOCAB_FILE} with {MERGES_FILE}, nor {QWEN1_FILE}",
            "The model directory is incomplete: fetch all its files (`git lfs pull` or `qwenrt pull`).",
        )
    if has_ranks and there("config.json"):
        return bool(read_json(directory / "config.json").get("model_type", "qwen") == "qwen")
    return not has_others


def _encoding(name: str, ranks: dict[bytes, int], pattern: str) -> tiktoken.Encoding:
    import tiktoken  # here, because it takes longer to import than the rest of this package

    # No special tokens: added tokens are found and placed by id on our side, never by the encoder.
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _may_have_long_blanks(text: str) -> bool:
    """Whether a run of blanks can be as long as _LONG_BLANKS: eight of the characters looked at would be in it."""
    return _EIGHT_BLANKS.search(text[:: _LONG_BLANKS // 8]) is not None


def _long_blanks(text: str, at_least: int) -> Iterator[slice]:
    r"""The pieces of the split pattern that are long runs of blanks without newline.

    The pattern's `\s+(?!\S)` keeps a backtracking stack as long as the run and overflows it near a million
    characters, so these pieces are encoded by themselves. A blank run that no newline follows is such a piece
    exactly: whatever comes before ends where it starts, and only its last blank, where text follows, belongs
    to what comes next.
    """
    for run in _BLANKS.finditer(text):
        start, end = run.span()
        if end - start < at_least or text[end : end + 1] in ("\r", "\n"):
            continue
        yield slice(start, end if end == len(text) else end - 1)
