"""The texts that a model is calibrated on: a user's, or written by the model itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwenrt.arguments import as_token_ids
from qwenrt.config import read_json
from qwenrt.errors import CheckpointError, RequestError
from qwenrt.files import is_there, read
from qwenrt.loader.checkpoint.writing import write_atomically
from qwenrt.loading import load_tokenizer
from qwenrt.quantize.self_written import write_texts
from qwenrt.quantize.settings import SELF, QuantizeSettings
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.entries import MAX_DATA_BYTES, Entry, bad_entry, entry_of, read_entries

_LEAST = 8  # tokens of a text that is worth its way through the model
_HELD_OUT, _LEAST_HELD_OUT = 16, 4  # one text in so many measures only, but so many at least
logger = logging.getLogger("qwenrt")


def texts_for(
    source: Path,
    calibration: str | Path | Sequence[Any],
    settings: QuantizeSettings,
    progress: bool | None = None,
    kept: Path | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """(texts that calibrate, texts that measure): what `all_texts` gives, divided."""
    return divided(all_texts(source, calibration, settings, progress, kept))


def all_texts(
    source: Path,
    calibration: str | Path | Sequence[Any],
    settings: QuantizeSettings,
    progress: bool | None = None,
    kept: Path | None = None,
) -> list[list[int]]:
    """Texts as token ids, ``settings.samples`` where there are so many.

    ``calibration``: a file of entries (JSON or JSON lines) or of plain text, entries, texts or token ids, or "self".
    ``kept``: a file for what the model writes, which takes as long as quantising; where it is there it is read.
    Raises RequestError where there are too few.
    """
    if calibration == SELF:
        texts = _read_kept(kept)
        if texts is None:
            texts = write_texts(source, load_tokenizer(source), settings, progress)
            if kept is not None:
                write_atomically(kept, json.dumps({"texts": texts}).encode(), "give the same call again")
    else:
        made = _texts_in(source, calibration, settings.sample_length)
        texts = [text for text in made if len(text) >= _LEAST][: settings.samples]
    if len(texts) <= _LEAST_HELD_OUT:
        raise RequestError(
            "calibrating",
            f"{len(texts)} texts of at least {_LEAST} tokens",
            f"Give more than {_LEAST_HELD_OUT}; 128 of 512 tokens each are usual.",
        )
    return texts


def _read_kept(kept: Path | None) -> list[list[int]] | None:
    if kept is None or not is_there(kept, CheckpointError):
        return None
    texts: list[list[int]] = read_json(kept, CheckpointError)["texts"]
    logger.info("the texts that the model wrote before are in %s", kept)
    return texts


def divided(texts: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """(texts that calibrate, texts that measure)"""
    every = max(2, min(_HELD_OUT, len(texts) // _LEAST_HELD_OUT))
    held_out = list(texts[every - 1 :: every])
    return [text for number, text in enumerate(texts) if number % every != every - 1], held_out


def warn_if_few(texts: Sequence[Sequence[int]], widest: int) -> None:
    """Say so where the inputs of the widest linear cannot be told apart by so few tokens."""
    tokens = sum(map(len, texts))
    if tokens < 2 * widest:
        logger.warning(
            "%d tokens calibrate linears of up to %d inputs: with fewer than twice as many the result may be worse "
            "than rounding; give more texts, or a larger samples or sample_length",
            tokens,
            widest,
        )


def _texts_in(source: Path, calibration: str | Path | Sequence[Any], length: int) -> Iterator[list[int]]:
    if isinstance(calibration, (str, Path)) and Path(calibration).suffix not in (".json", ".jsonl"):
        asked = f"calibration texts {calibration}"
        raw = read(Path(calibration), MAX_DATA_BYTES, RequestError, asked=asked, what="file of texts")
        yield from _windows(load_tokenizer(source).encode(raw.decode("utf-8-sig", errors="replace")), length)
        return
    values = read_entries(calibration) if isinstance(calibration, (str, Path)) else calibration
    tokenizer: ChatTokenizer | None = None
    for number, value in enumerate(values, 1):
        if isinstance(value, (list, tuple)) or hasattr(value, "dtype"):
            yield as_token_ids(value)[:length]
            continue
        tokenizer = tokenizer or load_tokenizer(source)
        entry = Entry(text=value) if isinstance(value, str) else entry_of(value, number)
        if entry.text is not None:
            yield from _windows([*tokenizer.encode(entry.text), tokenizer.eod_id], length)
        else:
            yield _conversation(tokenizer, entry, number)[:length]


def _windows(ids: list[int], length: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), length):
        yield ids[start : start + length]


def _conversation(tokenizer: ChatTokenizer, entry: Entry, number: int) -> list[int]:
    try:
        return tokenizer.encode_chat(
            entry.messages, add_generation_prompt=False, tools=list(entry.tools) or None
        )
    except RequestError as error:
        raise bad_entry(number, f"{error.asked}: {error.found}", error.remedy) from error
