"""A GGUF file's vocabulary and templates -> the files of a tokenizer as HuggingFace lays them out."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenrt.loader.checkpoint.gguf.metadata import Metadata
from qwenrt.text.tokenizer.merges import is_byte_level, to_bytes
from qwenrt.text.tokenizer.qwen1 import QWEN1_FILE, SPECIAL_TOKENS
from qwenrt.text.tokenizer.tokenizer_json import KNOWN_PATTERNS
from qwenrt.text.tokenizer.vocabulary import END_OF_TEXT, IM_END, IM_START

_TOKENIZER = "tokenizer."
_GGML = "tokenizer.ggml."
_PLAIN, _WITH_MARKS = KNOWN_PATTERNS
# tokenizer.ggml.pre -> the pattern that splits texts; files of old converters have none, or "default"
_PATTERNS = {"qwen2": _PLAIN, "default": _PLAIN, "deepseek-r1-qwen": _PLAIN, "qwen35": _WITH_MARKS}
# What converters take for control tokens by its look alone, and Qwen's own files show in texts.
_SHOWN = frozenset(
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
)
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_TYPES = range(_NORMAL, _BYTE + 1)


@dataclass(frozen=True)
class GgufTokenizer:
    """``files``: name -> content. ``end_ids``: every token that ends a text or a turn. ``chats``: whether the model has
    conversations."""

    files: Mapping[str, str]
    end_ids: list[int]
    chats: bool


def tokenizer_of(metadata: Metadata, model_type: str) -> GgufTokenizer:
    """The tokenizer's files; none of a file without a vocabulary. Raises ConfigError for a vocabulary of another
    kind."""
    templates = _templates(metadata)
    if not metadata.has(f"{_GGML}tokens"):
        return GgufTokenizer({}, _ends(metadata, {}), bool(templates))
    kind = metadata.text(f"{_GGML}model")
    if kind != "gpt2":
        raise metadata.bad(
            f"{_GGML}model", f"it is {kind!r:.40}", "Qwen's vocabularies are byte-level BPE: 'gpt2'."
        )
    words = _words(metadata)
    named = _named_tokens(metadata, words.contents)
    config: dict[str, Any] = {**named, "add_prefix_space": False, "clean_up_tokenization_spaces": False}
    if templates:
        config["chat_template"] = (
            templates["default"]
            if templates.keys() == {"default"}
            else [{"name": name, "template": text} for name, text in templates.items()]
        )
    files = {"tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n"}
    if model_type == "qwen":
        files[QWEN1_FILE] = _qwen1(metadata, words)
    else:
        files["tokenizer.json"] = _tokenizer_json(metadata, words)
    control = {content: i for i, (content, special) in words.added.items() if special}
    chats = IM_START in control if model_type == "qwen" else bool(templates)
    return GgufTokenizer(files, _ends(metadata, control), chats)


@dataclass(frozen=True)
class _Words:
    """``vocab``: ordinary tokens in their byte-level form. ``added``: id -> (content, whether it is a control token).
    ``contents``: all of them by id, those without a use too."""

    vocab: dict[str, int]
    added: dict[int, tuple[str, bool]]
    contents: list[str]


def _words(metadata: Metadata) -> _Words:
    contents = metadata.texts(f"{_GGML}tokens")
    key = f"{_GGML}token_type"
    types = metadata.integers(key) if metadata.has(key) else [_NORMAL] * len(contents)
    if len(types) != len(contents):
        raise metadata.bad(key, f"it has {len(types)} elements, and there are {len(contents)} tokens")
    vocab: dict[str, int] = {}
    added: dict[int, tuple[str, bool]] = {}
    for token_id, (content, kind) in enumerate(zip(contents, types)):
        if kind not in _TYPES:
            raise metadata.bad(key, f"token {token_id} is of type {kind}, which the format has not")
        if kind == _UNUSED or content == f"[PAD{token_id}]":
            continue  # a row of the embedding without a token
        if kind in (_NORMAL, _BYTE):
            if vocab.setdefault(content, token_id) != token_id:
                found = f"tokens {vocab[content]} and {token_id} are both {content!r:.60}"
                raise metadata.bad(f"{_GGML}tokens", found)
        else:
            added[token_id] = content, kind != _USER_DEFINED and content not in _SHOWN
    return _Words(vocab, added, contents)


def _named_tokens(metadata: Metadata, contents: list[str]) -> dict[str, str]:
    """bos_token, eos_token and pad_token of tokenizer_config.json. Nothing is ever put before a text: no Qwen does,
    and some conversions say so by accident."""
    named = {}
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        token_id = _token_id(metadata, key)
        if token_id is None:
            continue
        if token_id >= len(contents):
            found = f"it is {token_id}, and there are {len(contents)} tokens"
            raise metadata.bad(f"{_GGML}{key}_token_id", found)
        named[name] = contents[token_id]
    return named


def _token_id(metadata: Metadata, key: str) -> int | None:
    """An id that the file names; None where it has none, which some write as the largest number."""
    name = f"{_GGML}{key}_token_id"
    if not metadata.has(name):
        return None
    value = metadata.integer(name)
    return None if value < 0 or value == 2**32 - 1 else value


def _ends(metadata: Metadata, control: Mapping[str, int]) -> list[int]:
    named = [_token_id(metadata, key) for key in ("eos", "eot")]
    ids = [*named, control.get(IM_END), control.get(END_OF_TEXT)]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _templates(metadata: Metadata) -> dict[str, str]:
    """The chat templates by name."""
    templates = {}
    if metadata.has(f"{_TOKENIZER}chat_template"):
        templates["default"] = metadata.text(f"{_TOKENIZER}chat_template")
    if metadata.has(f"{_TOKENIZER}chat_templates"):
        for name in metadata.texts(f"{_TOKENIZER}chat_templates"):
            templates.setdefault(name, metadata.text(f"{_TOKENIZER}chat_template.{name}"))
    return templates


def _tokenizer_json(metadata: Metadata, words: _Words) -> str:
    pre = metadata.text(f"{_GGML}pre", "default")
    if pre not in _PATTERNS:
        known = ", ".join(_PATTERNS)
        raise metadata.bad(f"{_GGML}pre", f"it is {pre!r:.40}", f"Qwen's ways to split texts are {known}.")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _PATTERNS[pre]}, "behavior": "Isolated", "invert": False}
    around = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": token_id, "content": text, "special": special, **around}
            for token_id, (text, special) in words.added.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": words.vocab, "merges": metadata.texts(f"{_GGML}merges")},
    }
    return json.dumps(content, ensure_ascii=False)


def _qwen1(metadata: Metadata, words: _Words) -> str:
    """qwen.tiktoken: the ids of ordinary tokens are their ranks. The control tokens that follow are always the same."""
    key = f"{_GGML}tokens"
    if list(words.vocab.values()) != list(range(len(words.vocab))):
        raise metadata.bad(key, "the ids of its ordinary tokens have gaps, which Qwen-1's have not")
    wanted = dict(enumerate(SPECIAL_TOKENS, len(words.vocab)))
    found = {token_id: content for token_id, (content, _) in words.added.items()}
    if found != wanted:
        odd = next(i for i in sorted({*found, *wanted}) if found.get(i) != wanted.get(i))
        raise metadata.bad(
            key, f"token {odd} is {_shown_token(found, odd)}, and Qwen-1's is {_shown_token(wanted, odd)}"
        )
    odd_form = next((form for form in words.vocab if not is_byte_level(form)), None)
    if odd_form is not None:
        raise metadata.bad(key, f"token {words.vocab[odd_form]}, {odd_form!r:.60}, is not byte-level")
    lines = (f"{base64.b64encode(to_bytes(form)).decode()} {rank}\n" for form, rank in words.vocab.items())
    return "".join(lines)


def _shown_token(tokens: Mapping[int, str], token_id: int) -> str:
    return f"{tokens[token_id]!r:.60}" if token_id in tokens else "none"
