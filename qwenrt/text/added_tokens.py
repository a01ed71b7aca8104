"""Added tokens: which ones a model directory lists, and where their forms occur in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenrt.config import read_json
from qwenrt.errors import ConfigError
from qwenrt.text.unicode import nfc
from qwenrt.text.vocabulary import (
    END_OF_TEXT,
    FETCH_ALL_AGAIN,
    IM_END,
    IM_START,
    MAX_TOKEN_ID,
    AddedToken,
)

REQUIRED = (END_OF_TEXT, IM_START, IM_END)
# The control tokens of the generations after the first, for files that list forms and ids only. All other added
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
MAX_FORM_CHARS = 256

Listed = Iterator[tuple[str, AddedToken]]  # (where it is listed, what)


def read_added_tokens(
    directory: Path,
    tokenizer_json: object,
    tokenizer_config: Mapping[str, Any],
    vocab: Mapping[str, int],
    first_free_id: int,
) -> tuple[AddedToken, ...]:
    """The added tokens of a directory, by id.

    They are those of tokenizer.json (``tokenizer_json`` is its added_tokens, None without the file) and of
    tokenizer_config.json; where neither lists any, those of added_tokens.json; where none does, the three that
    every Qwen has, from ``first_free_id``. Those three are also looked for in ``vocab`` (form -> id).
    Raises ConfigError naming the entry, or which of the three is missing.
    """
    found: dict[str, AddedToken] = {}
    forms: dict[int, str] = {}

    def add(listed: Listed) -> None:
        for where, token in listed:
            known = found.setdefault(token.form, token)
            other = forms.setdefault(token.id, token.form)
            if known.id != token.id or other != token.form:
                raise ConfigError(
                    f"reading {where}",
                    f"{token.form!r} has id {token.id}, but "
                    + (f"{known.id} elsewhere" if known.id != token.id else f"that is the id of {other!r}"),
                    FETCH_ALL_AGAIN,
                )

    add(_from_tokenizer_json(tokenizer_json, f"{directory / 'tokenizer.json'}, added_tokens"))
    decoder = tokenizer_config.get("added_tokens_decoder")
    add(_from_decoder(decoder, f"{directory / 'tokenizer_config.json'}, added_tokens_decoder"))
    path = directory / "added_tokens.json"
    if not found and path.exists():
        add(_from_forms(read_json(path), str(path)))
    in_vocab = {form: vocab[form] for form in REQUIRED if form in vocab and form not in found}
    if not found and not in_vocab:
        in_vocab = {form: first_free_id + i for i, form in enumerate(REQUIRED)}
    add(_from_forms(in_vocab, str(directory)))
    missing = [form for form in REQUIRED if form not in found]
    if missing:
        raise ConfigError(
            f"reading {directory}",
            f"its {len(found)} added tokens do not include {' and '.join(missing)}",
            "Every Qwen has these: this is another model's tokenizer, or a file is missing.",
        )
    return tuple(sorted(found.values(), key=lambda token: token.id))


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


def _from_forms(entries: Mapping[str, object], where: str) -> Listed:
    for form, token_id in entries.items():
        at = f"{where}, {form!r:.60}"
        special = form in CONTROL_TOKENS
        yield at, _added_token({"content": form, "special": special, "normalized": False}, token_id, at)


def _added_token(entry: object, token_id: object, where: str) -> AddedToken:
    form = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(form, str):
        raise ConfigError(f"reading {where}", f"{entry!r:.60} has no content", FETCH_ALL_AGAIN)
    if not 0 < len(form) <= MAX_FORM_CHARS or re.search("[\ud800-\udfff]", form):
        raise ConfigError(
            f"reading {where}",
            f"content {form!r:.60}",
            f"It must be 1 to {MAX_FORM_CHARS} characters of text.",
        )
    if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
        found = f"id {token_id!r:.40} of {form!r:.60} is not 0 to {MAX_TOKEN_ID}"
        raise ConfigError(f"reading {where}", found, FETCH_ALL_AGAIN)
    for name in ("lstrip", "rstrip", "single_word", "special", "normalized"):
        value = entry.get(name, False)
        if not isinstance(value, bool):
            raise ConfigError(f"reading {where}", f"{name} is {value!r:.40}", "It must be true or false.")
        if value and name in ("lstrip", "rstrip", "single_word"):
            raise ConfigError(
                f"reading {where}",
                f"{form!r:.60} has {name} true",
                "No Qwen's token takes the text around it along: set it to false if you made this tokenizer.",
            )
    # The ends of texts and turns are control tokens whatever a file says: they must never show in an answer.
    special = entry.get("special", False) or form in REQUIRED
    normalized = entry.get("normalized", not special)
    return AddedToken(nfc(form) if normalized else form, token_id, special, normalized)


class FormFinder:
    """Finds the forms of tokens in a text, leftmost and longest first, in time linear in the text."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._lengths = sorted({len(form) for form in ids}, reverse=True)
        starts = {form[0] for form in ids}
        self._start = re.compile(f"[{''.join(map(re.escape, sorted(starts)))}]") if ids else None

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """(text before a form, the form's id) for each occurrence, then (the rest, None)."""
        end = position = 0
        while self._start is not None and (found := self._start.search(text, position)):
            start = found.start()
            position = start + 1
            for length in self._lengths:
                form = text[start : start + length]
                if form in self._ids:
                    yield text[end:start], self._ids[form]
                    end = position = start + len(form)
                    break
        yield text[end:], None
