"""Qwen-1's tokenizer over a qwen.tiktoken vocabulary: text <-> ids. Control tokens in text stay text."""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrt.config import read_json
from qwenrt.errors import CheckpointError, RequestError
from qwenrt.text.unicode import nfc, without_surrogates
from qwenrt.text.vocabulary import read_base_vocab, read_extra_vocab

if TYPE_CHECKING:
    import tiktoken

VOCAB_FILE = "qwen.tiktoken"
EXTRA_VOCAB_FILE = "qwen_extra.tiktoken"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RELEASED_RANKS = 151643  # tokens in the released qwen.tiktoken
_RELEASED_TOKEN = (
    b"Hello",
    9707,
)  # tells the released vocabulary, whole or cut off, from one of its own
_SPECIAL_FORM = re.compile(r"<\|[a-z0-9_]+\|>")
# Whitespace as the split pattern's \s understands it (re's own \s has four more), but for newlines.
_BLANKS = re.compile("[\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_LONG_BLANKS = 4096


class Tokenizer:
    """Text to token ids and back.

    The ids of ``ranks`` come first, the 208 control tokens right after (from 151643 with the released file),
    vocabulary extensions anywhere above. One object may be used by any number of threads.

    special_tokens: surface form -> id; special_ids: the same ids as a set. eod_id, im_start_id, im_end_id:
    the three with a meaning. vocab_size: largest id + 1; with an extension some ids below may have no token.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        extra_vocab_files: Iterable[str | Path] = (),
        name: str = "qwen",
    ) -> None:
        """``ranks``: token bytes -> 0..n-1, with all 256 single bytes (what read_base_vocab returns)."""
        all_ranks = dict(ranks)
        start = len(all_ranks)
        self.special_tokens = {form: start + i for i, form in enumerate(SPECIAL_TOKENS)}
        self.special_ids = frozenset(self.special_tokens.values())
        reserved = {form.encode() for form in SPECIAL_TOKENS}
        for token in reserved & all_ranks.keys():
            raise CheckpointError(
                f"vocabulary {name}",
                f"ordinary token {all_ranks[token]} is spelled like the control token {token.decode()}",
                "Control tokens are not part of the vocabulary file: remove it.",
            )
        for path in extra_vocab_files:
            read_extra_vocab(Path(path), all_ranks, reserved, self.special_ids)
        self.eod_id, self.im_start_id, self.im_end_id = start, start + 1, start + 2
        self.vocab_size = max(max(all_ranks.values()), max(self.special_ids)) + 1
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        for token, rank in all_ranks.items():
            self._bytes[rank] = token
        for form, token_id in self.special_tokens.items():
            self._bytes[token_id] = form.encode()
        self._encoding = _encoding(name, all_ranks)
        self.name = name

    @classmethod
    def from_dir(cls, path: str | Path, extra_vocab_files: Sequence[str | Path] = ()) -> Tokenizer:
        """Read a model directory: qwen.tiktoken, and its extension if there is one.

        Extensions are ``extra_vocab_files``, else the file that tokenizer_config.json names under
        extra_vocab_file, else qwen_extra.tiktoken. Raises CheckpointError or ConfigError naming the file.
        """
        directory = Path(path).expanduser()
        ranks = read_base_vocab(directory / VOCAB_FILE)
        configs = [
            (name, read_json(directory / name) if (directory / name).exists() else {})
            for name in ("generation_config.json", "tokenizer_config.json")
        ]
        _check_end_of_text(ranks, directory / VOCAB_FILE, configs)
        extra = extra_vocab_files or _extra_vocab_files(directory, configs[1][1])
        return cls(ranks, extra, name=str(directory))

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, eod_id={self.eod_id})"

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The token ids of the text's NFC form. Linear in its length, whatever it holds.

        Control tokens spelled in the text stay ordinary text unless ``allow_special``: only for text that no
        user wrote. Lone surrogates count as U+FFFD.
        """
        if not isinstance(text, str):
            raise RequestError("encoding text", f"got {type(text).__name__}", "Pass a str.")
        text = nfc(without_surrogates(text))
        if not allow_special:
            return self._encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for found in _SPECIAL_FORM.finditer(text):
            special = self.special_tokens.get(found.group())
            if special is not None:
                ids += self._encode_ordinary(text[start : found.start()])
                ids.append(special)
                start = found.end()
        return ids + self._encode_ordinary(text[start:])

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False, errors: str = "replace") -> str:
        """The text of ``ids``: their bytes joined, then decoded as UTF-8 with any codec error handler.

        ``skip_special_tokens`` drops the control tokens and nothing else. Unknown ids raise RequestError.
        """
        try:
            codecs.lookup_error(errors)
        except LookupError as error:
            raise RequestError(
                "decoding",
                f"errors={errors!r}",
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
        if skip_special_tokens:
            ids = (i for i in map(_index, ids) if i not in self.special_ids)
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; a control token's are its surface form."""
        index = _index(token_id)
        token = self._bytes[index] if 0 <= index < self.vocab_size else None
        if token is None:
            raise RequestError(
                f"decoding token id {index}",
                f"no such token, ids are 0 to {self.vocab_size - 1}",
                "Embedding rows past the vocabulary have no text and are never sampled.",
            )
        return token

    def has_token(self, token_id: int) -> bool:
        """Whether the id has a token (rows past the vocabulary, and gaps of an extension, have none)."""
        return 0 <= token_id < self.vocab_size and self._bytes[token_id] is not None

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_window_size: int | None = None,
    ) -> list[int]:
        """The ChatML prompt for OpenAI-shaped messages; see chat_template.build_messages."""
        from qwenrt.text.chat_template import build_messages

        return build_messages(
            self,
            messages,
            tools=tools,
            max_window_size=max_window_size,
            add_generation_prompt=add_generation_prompt,
        ).token_ids

    def _encode_ordinary(self, text: str) -> list[int]:
        if len(text) < _LONG_BLANKS:
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for blanks in _long_blanks(text, _LONG_BLANKS):
            ids += self._encoding.encode_ordinary(text[start : blanks.start])
            ids += self._encoding._encode_single_piece(text[blanks])
            start = blanks.stop
        return ids + self._encoding.encode_ordinary(text[start:])


def _index(token_id: object) -> int:
    try:
        return operator.index(token_id)  # type: ignore[arg-type]
    except TypeError as error:
        raise RequestError("decoding", f"token id {token_id!r:.80}", "Token ids are integers.") from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory. Needs no torch."""
    return Tokenizer.from_dir(path)


def _encoding(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    import tiktoken  # here, because it takes longer to import than the rest of this package

    # No special tokens: control tokens are found and placed by id on our side, never by the encoder.
    return tiktoken.Encoding(name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


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


def _extra_vocab_files(directory: Path, tokenizer_config: Mapping[str, Any]) -> list[Path]:
    named = tokenizer_config.get("extra_vocab_file")
    if named is None:
        default = directory / EXTRA_VOCAB_FILE
        return [default] if default.exists() else []
    if not isinstance(named, str) or not named or named in (".", "..") or re.search(r"[/\\:\0]", named):
        raise CheckpointError(
            f"reading {directory / 'tokenizer_config.json'}",
            f"extra_vocab_file is {named!r}",
            "It must be the plain name of a file in the same directory.",
        )
    return [directory / named]


def _check_end_of_text(
    ranks: Mapping[bytes, int],
    path: Path,
    configs: Sequence[tuple[str, Mapping[str, Any]]],
) -> None:
    """Refuse a vocabulary cut off at a line end: it reads well but would move every control token.

    Where the directory names end-of-sequence ids they must be ours; where it names none, a file that begins
    like the released vocabulary must have its length.
    """
    token, rank = _RELEASED_TOKEN
    eod_id, im_end_id = len(ranks), len(ranks) + SPECIAL_TOKENS.index(IM_END)
    cut_off = ranks.get(token) == rank and len(ranks) != RELEASED_RANKS
    named_any = False
    for name, config in configs:
        eos = config.get("eos_token_id")
        named = eos if isinstance(eos, list) else [] if eos is None else [eos]
        named_any = named_any or bool(named)
        agrees = eod_id in named or (im_end_id in named and not cut_off)
        if named and not agrees:
            raise CheckpointError(
                f"reading {path}",
                f"it holds {len(ranks)} tokens, so {END_OF_TEXT} is id {eod_id}, "
                f"but eos_token_id in {name} is {eos!r:.80}",
                "One of the two files is cut off or from another model: fetch both again.",
            )
    if cut_off and not named_any:
        raise CheckpointError(
            f"reading {path}",
            f"it begins like the released vocabulary but holds {len(ranks)} tokens, not {RELEASED_RANKS}",
            "Fetch the file again; it may be cut off. (An own vocabulary needs eos_token_id in "
            "generation_config.json.)",
        )
