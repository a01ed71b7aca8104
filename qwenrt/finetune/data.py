"""Training data: from files of conversations to tokens and labels, and to batches."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenrt.config.fields import has_more_values
from qwenrt.errors import RequestError
from qwenrt.files import read
from qwenrt.text.chat.react import DEFAULT_SYSTEM
from qwenrt.text.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("qwenrt")

MAX_DATA_BYTES = 2**30
MAX_DATA_VALUES = 16 * 10**6
IGNORE = -100  # a label that carries no loss
_PAD_TO = 8  # batches are padded to a multiple of this many tokens


def read_entries(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a JSON list or of JSON lines (one object a line). RequestError names the line."""
    path = Path(path)
    asked = f"training data {path}"
    raw = read(path, MAX_DATA_BYTES, RequestError, asked=asked, what="file that fits into memory: split it")
    if has_more_values(raw, MAX_DATA_VALUES):
        raise RequestError(asked, f"more than {MAX_DATA_VALUES} JSON values", "Split it.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = raw[: error.start].count(b"\n") + 1
        raise RequestError(
            f"training data {path}", f"line {where} is not UTF-8", "Save it as UTF-8."
        ) from error
    if not text.lstrip().startswith("{"):
        return _parse_list(path, text)
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                found = f"line {number} is not JSON ({str(error)[:80]})"
                raise RequestError(f"training data {path}", found, "Correct that line.") from error
    return entries


def _parse_list(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        number = getattr(error, "lineno", 1)
        found = f"line {number} is not JSON ({str(error)[:80]})"
        raise RequestError(
            f"training data {path}", found, "Correct it, or write one entry a line."
        ) from error
    if not isinstance(entries, list):
        found = f"a JSON {type(entries).__name__}"
        raise RequestError(f"training data {path}", found, "It must be a list of entries.")
    return entries


def encode_entry(tokenizer: Tokenizer, entry: object, number: int = 1) -> tuple[list[int], list[int]]:
    """(token ids, labels) of one entry, in Qwen-1's training form. RequestError names entry ``number``.

    Every turn is <|im_start|>role\\ncontent<|im_end|>\\n. Labels are the ids themselves on im_start, im_end and the
    newline after it for every role, and on the content of the assistant; IGNORE elsewhere.
    """
    if not isinstance(entry, dict):
        raise _bad_entry(number, f"a JSON {type(entry).__name__}", "Each entry must be an object.")
    if "text" in entry:
        ids = [*tokenizer.encode(_text(entry["text"], number, "text")), tokenizer.eod_id]
        return ids, list(ids)
    turns = _turns(entry, number)
    newline = tokenizer.encode("\n")
    im_start, im_end = tokenizer.turn_ids()
    start, end = [im_start], [im_end, *newline]
    ids, labels = [], []
    system = _text(entry.get("system", DEFAULT_SYSTEM), number, "system")
    if turns[0][0] != "system":
        turns = [("system", system), *turns]
    for role, text in turns:
        head, content = [*tokenizer.encode(role), *newline], tokenizer.encode(text)
        ids += [*start, *head, *content, *end]
        spoken = content if role == "assistant" else [IGNORE] * len(content)
        labels += [*start, *[IGNORE] * len(head), *spoken, *end]
    return ids, labels


def _turns(entry: dict[str, Any], number: int) -> list[tuple[str, str]]:
    """(role, text) of every turn: a system prompt of "messages" first where there is one, else user and assistant."""
    name, by, said = ("conversations", "from", "value")
    if "conversations" not in entry and "messages" in entry:
        name, by, said = ("messages", "role", "content")  # the shape of OpenAI, as llm.chat takes it
    turns = entry.get(name)
    if not isinstance(turns, list) or not turns:
        remedy = (
            'Give {"conversations": [{"from": "user", "value": "..."}, ...]}, '
            '{"messages": [{"role": "user", "content": "..."}, ...]} or {"text": "..."}.'
        )
        raise _bad_entry(number, "no list of conversations", remedy)
    pairs = []
    for index, turn in enumerate(turns):
        where = f"{name}[{index}]"
        if not isinstance(turn, dict):
            raise _bad_entry(number, f"{where} is a JSON {type(turn).__name__}", "It must be an object.")
        role = turn.get(by)
        if index == 0 and name == "conversations" and role != "user":
            continue  # one leading turn of another role is dropped, as the original trainer does
        if role not in ("user", "assistant") and (index > 0 or role != "system"):
            raise _bad_entry(number, f"{where} is from {role!r:.40}", "It must be 'user' or 'assistant'.")
        pairs.append((role, _text(turn.get(said), number, f"{where} {said}")))
    if not any(role == "assistant" for role, _ in pairs):
        raise _bad_entry(number, "no turn of the assistant", "There is nothing to learn: remove the entry.")
    return pairs


def _text(value: object, number: int, what: str) -> str:
    if not isinstance(value, str):
        raise _bad_entry(number, f"{what} is {type(value).__name__}, not text", "Give a string.")
    return value


def _bad_entry(number: int, found: str, remedy: str) -> RequestError:
    return RequestError(f"training data, entry {number}", found, remedy)


@dataclass(frozen=True)
class Corpus:
    """All entries as tokens: ``ids`` and ``labels`` int32, entry i at starts[i] : starts[i + 1]."""

    ids: torch.Tensor
    labels: torch.Tensor
    starts: list[int]

    @classmethod
    def encode(cls, tokenizer: Tokenizer, entries: Sequence[object], max_length: int) -> Corpus:
        ids: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        starts = [0]
        for number, entry in enumerate(entries, 1):
            entry_ids, entry_labels = encode_entry(tokenizer, entry, number)
            if all(label == IGNORE for label in entry_labels[1:max_length]):
                continue
            ids.append(torch.tensor(entry_ids[:max_length], dtype=torch.int32))
            labels.append(torch.tensor(entry_labels[:max_length], dtype=torch.int32))
            starts.append(starts[-1] + len(ids[-1]))
        dropped = len(entries) - len(ids)
        if not ids:
            found = f"none of {len(entries)} entries has anything to learn in its first {max_length} tokens"
            raise RequestError("training data", found, "Give at least one, or a larger max_length.")
        if dropped:
            found = "have nothing to learn in their first"
            logger.warning("%d of %d entries %s %d tokens", dropped, len(entries), found, max_length)
        return cls(torch.cat(ids), torch.cat(labels), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, entry: int) -> int:
        return self.starts[entry + 1] - self.starts[entry]

    def batches(self, seed: int, epoch: int, batch_tokens: int) -> list[list[int]]:
        """Entry numbers of each step of an epoch: entries of similar length together, so that little is padding."""
        rng = random.Random(f"{seed}-{epoch}")
        order = list(range(len(self)))
        rng.shuffle(order)
        window = max(256, batch_tokens // 4)
        batches: list[list[int]] = []
        for begin in range(0, len(order), window):
            batch: list[int] = []
            for entry in sorted(order[begin : begin + window], key=self.length):
                if batch and _padded(self.length(entry)) * (len(batch) + 1) > batch_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(entry)
            batches.append(batch)
        rng.shuffle(batches)
        return batches

    def take(self, batch: list[int], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, labels int64 [len(batch), padded length]; padded on the right, without loss."""
        width = _padded(max(self.length(entry) for entry in batch))
        ids = torch.full((len(batch), width), pad_id, dtype=torch.int64)
        labels = torch.full((len(batch), width), IGNORE, dtype=torch.int64)
        for row, entry in enumerate(batch):
            here = slice(self.starts[entry], self.starts[entry + 1])
            ids[row, : self.length(entry)] = self.ids[here]
            labels[row, : self.length(entry)] = self.labels[here]
        return ids, labels

    def digest(self) -> str:
        """A fingerprint of all tokens and labels."""
        parts = (self.ids.numpy().tobytes(), self.labels.numpy().tobytes(), repr(self.starts).encode())
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _padded(length: int) -> int:
    return -(-length // _PAD_TO) * _PAD_TO
