"""The vocabulary of a Qwen-1 directory: qwen.tiktoken, its extension, and 208 control tokens after its ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenrt.config import read_json
from qwenrt.errors import CheckpointError
from qwenrt.files import is_there
from qwenrt.text.tokenizer.vocabulary import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    AddedToken,
    Vocabulary,
    read_base_vocab,
    read_extra_vocab,
)

QWEN1_FILE = "qwen.tiktoken"
EXTRA_VOCAB_FILE = "qwen_extra.tiktoken"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))
RELEASED_RANKS = 151643  # tokens in the released qwen.tiktoken
_RELEASED_TOKEN = (b"Hello", 9707)  # tells the released vocabulary, whole or truncated, from any other


def read_qwen1(directory: Path, extra_vocab_files: Sequence[str | Path] = ()) -> Vocabulary:
    """Read a model directory: qwen.tiktoken, and its extension if there is one.

    Extensions are ``extra_vocab_files``, else the file that tokenizer_config.json names under
    extra_vocab_file, else qwen_extra.tiktoken. Raises CheckpointError or ConfigError naming the file.
    """
    ranks = read_base_vocab(directory / QWEN1_FILE)
    configs = [
        (name, read_json(directory / name) if is_there(directory / name, CheckpointError) else {})
        for name in ("generation_config.json", "tokenizer_config.json")
    ]
    _check_end_of_text(ranks, directory / QWEN1_FILE, configs)
    vocabulary = with_control_tokens(ranks, str(directory))
    extended = dict(ranks)
    ids = [token.id for token in vocabulary.added]
    for path in extra_vocab_files or _extra_vocab_files(directory, configs[1][1]):
        read_extra_vocab(Path(path), extended, {content.encode() for content in SPECIAL_TOKENS}, ids)
    return Vocabulary(extended, vocabulary.added)


def with_control_tokens(ranks: Mapping[bytes, int], name: str) -> Vocabulary:
    """The 208 control tokens right after ``ranks``, which are 0..n-1 (what read_base_vocab returns)."""
    for content in SPECIAL_TOKENS:
        if content.encode() in ranks:
            raise CheckpointError(
                f"vocabulary {name}",
                f"ordinary token {ranks[content.encode()]} is spelled like the control token {content}",
                "Control tokens are not part of the vocabulary file: remove it.",
            )
    added = [AddedToken(content, len(ranks) + i, True, True) for i, content in enumerate(SPECIAL_TOKENS)]
    return Vocabulary(ranks, tuple(added))


def is_truncated(ranks: Mapping[bytes, int]) -> bool:
    """Whether these are the first lines of the released vocabulary, and not all of them."""
    token, rank = _RELEASED_TOKEN
    return ranks.get(token) == rank and len(ranks) != RELEASED_RANKS


def _extra_vocab_files(directory: Path, tokenizer_config: Mapping[str, Any]) -> list[Path]:
    named = tokenizer_config.get("extra_vocab_file")
    if named is None:
        default = directory / EXTRA_VOCAB_FILE
        return [default] if is_there(default, CheckpointError) else []
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
    """Refuse a vocabulary truncated at a line end: it can be read, but would shift every control token.

    Where the directory names end-of-sequence ids they must be ours; where it names none, a file that begins
    like the released vocabulary must have its length.
    """
    eod_id, im_end_id = len(ranks), len(ranks) + SPECIAL_TOKENS.index(IM_END)
    cut_off = is_truncated(ranks)
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
                "One of the two files is truncated or from another model: fetch both again.",
            )
    if cut_off and not named_any:
        raise CheckpointError(
            f"reading {path}",
            f"it begins like the released vocabulary but holds {len(ranks)} tokens, not {RELEASED_RANKS}",
            "Fetch the file again; it may be truncated. (A vocabulary of your own needs eos_token_id in "
            "generation_config.json.)",
        )
