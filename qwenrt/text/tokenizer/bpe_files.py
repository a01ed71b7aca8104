"""The vocabulary of a directory of any generation after the first: tokenizer.json, or vocab.json and merges.txt.

A qwen.tiktoken serves as well: its ranks are the same, the added tokens come from the other files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenrt.config import read_json
from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.files import is_there
from qwenrt.text.template.sources import template_sources
from qwenrt.text.tokenizer.added_tokens import read_added_tokens, token_content
from qwenrt.text.tokenizer.merges import check_forms, check_ids, is_byte_level, merged_ranks, split_merges
from qwenrt.text.tokenizer.qwen1 import QWEN1_FILE, is_truncated
from qwenrt.text.tokenizer.tokenizer_json import read_tokenizer_json
from qwenrt.text.tokenizer.vocabulary import (
    FETCH_ALL_AGAIN,
    AddedToken,
    Vocabulary,
    read_base_vocab,
    read_limited,
)

TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"
MAX_MERGES_BYTES = 64 * 2**20  # the released file has 1.7 MB
_MAX_UNMERGED = 0.01  # part of a vocabulary that its merges may miss; more means that merges are missing


def read_bpe(directory: Path) -> Vocabulary:
    """The vocabulary in the first of tokenizer.json, vocab.json with merges.txt, and qwen.tiktoken that is there.

    Raises ConfigError or CheckpointError naming the file, the entry and what is wrong with it.
    """
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path) if is_there(config_path, ConfigError) else {}
    written = _templates(directory, config)
    if is_there(directory / TOKENIZER_FILE, CheckpointError):
        vocabulary = _from_tokenizer_json(directory, config, written)
    elif any(is_there(directory / name, CheckpointError) for name in (VOCAB_FILE, MERGES_FILE)):
        vocabulary = _from_vocab_and_merges(directory, config, written)
    else:
        vocabulary = _from_ranks(directory, config, written)
    _check_collisions(vocabulary, directory)
    return replace(vocabulary, eos_token_id=_eos_token_id(config, config_path, vocabulary))


def _templates(directory: Path, config: Mapping[str, Any]) -> str:
    """The text of the directory's chat templates. Errors in them are raised when a chat needs them, not here."""
    try:
        return "\n".join(source.text for source in template_sources(directory, config).values())
    except ConfigError:
        return ""


def _from_tokenizer_json(directory: Path, config: Mapping[str, Any], templates: str) -> Vocabulary:
    path = directory / TOKENIZER_FILE
    file = read_tokenizer_json(path)
    vocab = check_ids(file.vocab, f"{path}, model.vocab")
    first_free = max(vocab.values(), default=-1) + 1
    added = read_added_tokens(directory, file.added_tokens, config, vocab, first_free, templates, file.nfc)
    ordinary = _ordinary(vocab, added, f"{path}, model.vocab")
    merges = split_merges(file.merges, where := lambda number: f"{path}, model.merges[{number}]")
    ranks, unmerged = _merged(ordinary, merges, where, added, f"{path}, model.merges")
    if file.ignore_merges and unmerged:
        raise ConfigError(
            f"reading {path}, model.ignore_merges",
            f"true, but no merge makes {next(iter(unmerged))!r:.60}",
            "With ignore_merges only vocabularies are supported whose tokens are all made by merges.",
        )
    return Vocabulary(
        ranks,
        added,
        unmerged,
        file.pattern,
        file.nfc,
        prefix_ids=file.prefix_ids,
        suffix_ids=file.suffix_ids,
    )


def _from_vocab_and_merges(directory: Path, config: Mapping[str, Any], templates: str) -> Vocabulary:
    """These two files name no pattern and no normaliser: they are Qwen's own."""
    path, merges_path = directory / VOCAB_FILE, directory / MERGES_FILE
    vocab = check_ids(read_json(path), str(path))
    added = read_added_tokens(directory, None, config, vocab, max(vocab.values(), default=-1) + 1, templates)
    ordinary = _ordinary(vocab, added, str(path))
    merges, where = _read_merges(merges_path)
    ranks, unmerged = _merged(ordinary, merges, where, added, str(merges_path))
    last = max(unmerged, key=unmerged.__getitem__, default=b"")
    if last and unmerged[last] > max(ranks.values()):
        raise ConfigError(
            f"reading {merges_path}",
            f"its {len(merges)} merges end before token {unmerged[last]} of {VOCAB_FILE} ({last!r:.60})",
            "The file is truncated: fetch it again.",
        )
    return Vocabulary(ranks, added, unmerged)


def _from_ranks(directory: Path, config: Mapping[str, Any], templates: str) -> Vocabulary:
    ranks = read_base_vocab(directory / QWEN1_FILE)
    added = read_added_tokens(directory, None, config, {}, len(ranks), templates)
    if is_truncated(ranks) or added[0].id > len(ranks):
        raise CheckpointError(
            f"reading {directory / QWEN1_FILE}",
            f"it holds {len(ranks)} tokens, the first added token is {added[0].id}",
            "The file is truncated or from another model: fetch it again.",
        )
    return Vocabulary(ranks, added)


def _read_merges(path: Path) -> tuple[list[tuple[str, str]], Callable[[int], str]]:
    """The pairs in a merges.txt, and a function that tells where in the file a pair is."""
    try:
        lines = read_limited(path, MAX_MERGES_BYTES).decode().split("\n")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is not UTF-8 ({error.reason})"
        raise CheckpointError(f"reading {path}", found, FETCH_ALL_AGAIN) from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1)]
    if numbered[0][1].startswith("#version"):
        del numbered[0]
    numbered = [(number, line) for number, line in numbered if line]

    def where(index: int) -> str:
        return f"{path}, line {numbered[index][0]}"

    return split_merges([line for _, line in numbered], where), where


def _ordinary(vocab: Mapping[str, int], added: tuple[AddedToken, ...], where: str) -> dict[str, int]:
    """The vocabulary without added tokens that are listed in it as well, in their plain spelling."""
    ordinary = dict(vocab)
    for token in added:
        if ordinary.get(token.content) == token.id and not is_byte_level(token.content):
            del ordinary[token.content]
    check_forms(ordinary, where)
    return ordinary


def _merged(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    where: Callable[[int], str],
    added: tuple[AddedToken, ...],
    source: str,
) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """merged_ranks, but for the added tokens; refuses a list of merges that lost many of its entries."""
    ranks, unmerged = merged_ranks(vocab, merges, where)
    for token in added:
        if unmerged.get(token.content.encode()) == token.id:
            del unmerged[token.content.encode()]
    if len(unmerged) > _MAX_UNMERGED * len(vocab):
        raise ConfigError(
            f"reading {source}",
            f"its {len(merges)} entries make {len(ranks)} of {len(vocab)} tokens; "
            f"{next(iter(unmerged))!r:.60} is one of the others",
            FETCH_ALL_AGAIN,
        )
    return ranks, unmerged


def _check_collisions(vocabulary: Vocabulary, directory: Path) -> None:
    """An added token must be no ordinary token: neither its id nor, for a control token, its spelling."""
    ordinary = {**vocabulary.unmerged, **vocabulary.ranks}
    by_id = {token_id: token for token, token_id in ordinary.items()}
    for token in vocabulary.added:
        content = token.content.encode()
        spelled = ordinary.get(content)
        other = by_id.get(token.id, content)
        if other != content:
            added = f"id {token.id} of the added token {token.content!r:.60}"
            found = f"{added} is that of the ordinary token {other!r:.60}"
        elif spelled is not None and (spelled != token.id or token.control):
            found = (
                f"ordinary token {spelled} is spelled like the added token {token.content!r:.60} ({token.id})"
            )
        else:
            continue
        raise ConfigError(f"reading {directory}", found, FETCH_ALL_AGAIN)


def _eos_token_id(config: Mapping[str, Any], path: Path, vocabulary: Vocabulary) -> int | None:
    """The id of tokenizer_config.json's eos_token: <|im_end|> in chat models, <|endoftext|> in base models."""
    eos = config.get("eos_token")
    content = token_content(eos)
    if eos is None:
        return None
    if content is None:
        raise ConfigError(
            f"reading {path}, eos_token", f"it is {eos!r:.80}", "It must be the content of a token."
        )
    ids = {token.content: token.id for token in vocabulary.added}
    token_id = ids.get(content, vocabulary.ranks.get(content.encode("utf-8", "surrogatepass")))
    if token_id is None:
        raise ConfigError(
            f"reading {path}, eos_token",
            f"{content!r:.60} is no token of this vocabulary ({len(vocabulary.ranks)} tokens, {len(ids)} added)",
            FETCH_ALL_AGAIN,
        )
    return token_id
