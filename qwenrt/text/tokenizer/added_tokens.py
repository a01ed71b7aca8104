"""Added tokens: which ones a model directory lists, and where their contents occur in a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from qwenrt.config import read_json
from qwenrt.errors import ConfigError
from qwenrt.files import is_there
from qwenrt.text.tokenizer.slices import first
from qwenrt.text.tokenizer.unicode import nfc
from qwenrt.text.tokenizer.vocabulary import (
    END_OF_TEXT,
    FETCH_ALL_AGAIN,
    IM_END,
    IM_START,
    MAX_TOKEN_ID,
    AddedToken,
)

REQUIRED = (END_OF_TEXT, IM_START, IM_END)
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# The control tokens of the generations after the first, for files that list contents and ids only. All other added
# tokens (<think>, <tool_call>, <|fim_prefix|>, ...) are text that a reader wants to see.
CONTROL_TOKENS = frozenset(REQUIRED) | {
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>"),
    *(
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
}
# What every generation writes around thoughts and calls. Where a file calls these special, an answer is still read by
# them: dropped from it, a thought would never end and a call would be lost.
_TAGS = frozenset(
    ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
)
_CONTROL_SHAPE = re.compile("<[|\uff5c].*[|\uff5c]>", re.DOTALL)  # <|im_start|>; DeepSeek's bars are wide
# <answer>, [INST]; other text of a template is no structure
_TAG_SHAPE = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")
MAX_TOKEN_CHARS = 256
# As \w and \s of the tokenizers library, which has Unicode's definitions; Python's differ in these.
_WORD_CATEGORIES = ("L", "M", "Nd", "Nl", "Pc")
_MORE_WORD = re.compile("[\u200c\u200d\u24b6-\u24e9]")
_BLANK = (
    "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)

Listed = Iterator[tuple[str, AddedToken]]  # (where it is listed, what)


def read_added_tokens(
    directory: Path,
    tokenizer_json: object,
    tokenizer_config: Mapping[str, Any],
    vocab: Mapping[str, int],
    first_free_id: int,
    templates: str = "",
    composes: bool = True,
) -> tuple[AddedToken, ...]:
    """The added tokens of a directory, by id.

    They are those of tokenizer.json (``tokenizer_json`` is its added_tokens, None without the file) and of
    tokenizer_config.json; where neither lists any, those of added_tokens.json; where none does, the three that
    every Qwen has, from ``first_free_id``. Those three are also looked for in ``vocab`` (content -> id). A model with
    none of the three, but with an eos_token of its own among its added tokens, is one that was trained with other
    control tokens.

    ``composes``: whether texts are composed (NFC) before "normalized" forms are looked for, which are so too.

    Which of them are control tokens: those that a file calls special, those that tokenizer_config.json names as ends
    and beginnings, those written `<|...|>`, the family's tags of thoughts and calls, and the tags (`<...>`, `[...]`)
    that stand in ``templates``, the directory's chat templates. All others are words.
    Raises ConfigError naming the entry, or which of the three is missing.
    """
    found: dict[str, AddedToken] = {}
    contents: dict[int, str] = {}

    def add(listed: Listed) -> None:
        for where, token in listed:
            known = found.setdefault(token.content, token)
            if token.special and not known.special:  # either file may call it special
                found[token.content] = replace(known, special=True)
            other = contents.setdefault(token.id, token.content)
            if known.id != token.id or other != token.content:
                raise ConfigError(
                    f"reading {where}",
                    f"{token.content!r} has id {token.id}, but "
                    + (f"{known.id} elsewhere" if known.id != token.id else f"that is the id of {other!r}"),
                    FETCH_ALL_AGAIN,
                )

    add(_from_tokenizer_json(tokenizer_json, f"{directory / 'tokenizer.json'}, added_tokens"))
    decoder = tokenizer_config.get("added_tokens_decoder")
    add(_from_decoder(decoder, f"{directory / 'tokenizer_config.json'}, added_tokens_decoder"))
    path = directory / "added_tokens.json"
    if not found and is_there(path, ConfigError):
        add(_from_contents(read_json(path), str(path)))
    in_vocab = {content: vocab[content] for content in REQUIRED if content in vocab and content not in found}
    if not found and not in_vocab:
        in_vocab = {content: first_free_id + i for i, content in enumerate(REQUIRED)}
    add(_from_contents(in_vocab, str(directory)))
    named = _named_tokens(tokenizer_config) & set(found)
    missing = [content for content in REQUIRED if content not in found]
    if missing and (
        len(missing) < len(REQUIRED) or token_content(tokenizer_config.get("eos_token")) not in found
    ):
        raise ConfigError(
            f"reading {directory}",
            f"its {len(found)} added tokens do not include {' and '.join(missing)}, and it names no end of text "
            "of its own (eos_token in tokenizer_config.json)",
            "Every Qwen has these: a file is missing or damaged, or this is the tokenizer of another family.",
        )
    return tuple(
        replace(
            token,
            content=nfc(token.content) if composes and token.normalized else token.content,
            special=(token.special or token.content in named) and token.content not in _TAGS,
            control=_is_control(token, named, templates),
        )
        for token in sorted(found.values(), key=lambda token: token.id)
    )


def _named_tokens(tokenizer_config: Mapping[str, Any]) -> set[str]:
    """The contents that tokenizer_config.json itself calls special."""
    values = [tokenizer_config.get(name) for name in NAMED_TOKENS]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = tokenizer_config.get(name)
        values += more if isinstance(more, list) else more.values() if isinstance(more, dict) else []
    return {content for value in values if (content := token_content(value)) is not None}


def token_content(value: object) -> str | None:
    """The content of a token that tokenizer_config.json names: a text, or an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _is_control(token: AddedToken, named: Collection[str], templates: str) -> bool:
    content = token.content
    return (
        token.special
        or content in named
        or content in _TAGS
        or _CONTROL_SHAPE.fullmatch(content) is not None
        or (content in templates and _TAG_SHAPE.fullmatch(content) is not None)
    )


def _from_tokenizer_json(entries: object, where: str) -> Listed:
    if not isinstance(entries, list | None):
        raise ConfigError(f"reading {where}", f"a JSON {type(entries).__name__}, not a list", FETCH_ALL_AGAIN)
    for number, entry in enumerate(entries or ()):
        token_id = entry.get("id") if isinstance(entry, dict) else None
        yield f"{where}[{number}]", _added_token(entry, token_id, f"{where}[{number}]")


def _from_decoder(entries: object, where: str) -> Listed:
    if not isinstance(entries, dict | None):
        raise ConfigError(
            f"reading {where}", f"a JSON {type(entries).__name__}, not an object", FETCH_ALL_AGAIN
        )
    for key, entry in (entries or {}).items():
        at = f"{where}[{key!r:.40}]"
        yield at, _added_token(entry, int(key) if re.fullmatch("[0-9]{1,9}", key) else key, at)


def _from_contents(entries: Mapping[str, object], where: str) -> Listed:
    for content, token_id in entries.items():
        at = f"{where}, {content!r:.60}"
        special = content in CONTROL_TOKENS
        yield at, _added_token({"content": content, "special": special, "normalized": False}, token_id, at)


def _added_token(entry: object, token_id: object, where: str) -> AddedToken:
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(content, str):
        raise ConfigError(f"reading {where}", f"{entry!r:.60} has no content", FETCH_ALL_AGAIN)
    if not 0 < len(content) <= MAX_TOKEN_CHARS or re.search("[\ud800-\udfff]", content):
        raise ConfigError(
            f"reading {where}",
            f"content {content!r:.60}",
            f"It must be 1 to {MAX_TOKEN_CHARS} characters of text.",
        )
    if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
        found = f"id {token_id!r:.40} of {content!r:.60} is not 0 to {MAX_TOKEN_ID}"
        raise ConfigError(f"reading {where}", found, FETCH_ALL_AGAIN)
    for name in ("lstrip", "rstrip", "single_word", "special", "normalized"):
        value = entry.get(name, False)
        if not isinstance(value, bool):
            raise ConfigError(f"reading {where}", f"{name} is {value!r:.40}", "It must be true or false.")
    # The ends of texts and turns are control tokens whatever a file says: they must never show in an answer.
    special = entry.get("special", False) or content in REQUIRED
    normalized = entry.get("normalized", not special)
    around = {name: entry.get(name, False) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(content, token_id, special, normalized, **around)


class TokenMatch(NamedTuple):
    """Where a token stands in a text, with the white space that it takes along, in which the next may begin."""

    start: int
    end: int
    id: int


class AddedTokenFinder:
    """Finds the contents of tokens in a text, leftmost and longest first, in time linear in the text. Of two tokens of
    one content, composed, the first counts."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens: dict[str, AddedToken] = {}
        for token in tokens:
            self._tokens.setdefault(token.content, token)
        lengths: dict[str, set[int]] = {}
        for content in self._tokens:
            lengths.setdefault(content[0], set()).add(len(content))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        starts = "".join(map(re.escape, sorted(lengths)))
        self._start = re.compile(f"[{starts}]") if starts else None

    def find(self, text: str, words_only: bool = False) -> Iterator[TokenMatch]:
        """The tokens in the text, in their order. ``words_only``: control tokens are passed over, and what is
        inside them too."""
        end = position = 0
        while self._start is not None and (start := first(self._start, text, position)) is not None:
            token = self._at(text, start)
            position = start + 1
            if token is None:
                continue
            position = stop = start + len(token.content)
            if (words_only and token.control) or (token.single_word and _goes_on(text, start, stop)):
                continue
            while token.lstrip and start > end and text[start - 1] in _BLANK:
                start -= 1
            while token.rstrip and stop < len(text) and text[stop] in _BLANK:
                stop += 1
            yield TokenMatch(start, stop, token.id)
            end = stop

    def _at(self, text: str, start: int) -> AddedToken | None:
        lengths = self._lengths[text[start]]
        return next((t for n in lengths if (t := self._tokens.get(text[start : start + n]))), None)


def _goes_on(text: str, start: int, end: int) -> bool:
    """Whether a word goes on before or behind a place in the text."""
    return any(
        unicodedata.category(character).startswith(_WORD_CATEGORIES) or _MORE_WORD.match(character)
        for character in (text[start - 1 : start], text[end : end + 1])
        if character
    )
