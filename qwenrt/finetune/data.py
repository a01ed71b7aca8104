"""Training data: from files of conversations to tokens and labels, and to batches."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwenrt.errors import RequestError
from qwenrt.text.chat.react import DEFAULT_SYSTEM
from qwenrt.text.entries import Entry, bad_entry, entry_of
from qwenrt.text.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("qwenrt")

IGNORE = -100  # a label that carries no loss
_PAD_TO = 8  # batches are padded to a multiple of this many tokens


def encode_entry(tokenizer: Tokenizer, entry: object, number: int = 1) -> tuple[list[int], list[int]]:
    """(token ids, labels) of one entry, in Qwen-1's training form. RequestError names entry ``number``.

    Every turn is <|im_start|>role\\ncontent<|im_end|>\\n. Labels are the ids themselves on im_start, im_end and the
    newline after it for every role, and on the content of the assistant; IGNORE elsewhere.
    """
    read = entry_of(entry, number)
    if read.text is not None:
        ids = [*tokenizer.encode(read.text), tokenizer.eod_id]
        return ids, list(ids)
    turns = _turns(read, number)
    newline = tokenizer.encode("\n")
    im_start, im_end = tokenizer.turn_ids()
    start, end = [im_start], [im_end, *newline]
    ids, labels = [], []
    if turns[0][0] != "system":
        turns = [("system", DEFAULT_SYSTEM), *turns]
    for role, text in turns:
        head, content = [*tokenizer.encode(role), *newline], tokenizer.encode(text)
        ids += [*start, *head, *content, *end]
        spoken = content if role == "assistant" else [IGNORE] * len(content)
        labels += [*start, *[IGNORE] * len(head), *spoken, *end]
    return ids, labels


def _turns(entry: Entry, number: int) -> list[tuple[str, str]]:
    """(role, text) of every turn: a system prompt first where there is one, else user and assistant."""
    pairs = [(message["role"], message.get("content")) for message in entry.messages]
    if (
        any(message.get("tool_calls") or message["role"] == "tool" for message in entry.messages)
        or entry.tools
    ):
        remedy = "Write calls as the text that the model is to say, in the ReAct form."
        raise bad_entry(
            number, "it has tools or calls, for which Qwen-1's training form has no place", remedy
        )
    if not any(role == "assistant" for role, _ in pairs):
        raise bad_entry(number, "no turn of the assistant", "There is nothing to learn: remove the entry.")
    return [(role, text) for role, text in pairs if text is not None]


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
