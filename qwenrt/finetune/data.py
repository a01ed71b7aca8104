"""Training data in memory: samples as tokens and labels, the counts that tell what became of the entries, batches."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from qwenrt.errors import RequestError
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.training_form import IGNORE, FormSettings, training_samples
from qwenrt.text.entries import Entries

_SHOWN_TOKENS = 400  # of the sample that is shown


@dataclass(frozen=True)
class Counts:
    """What became of the entries. ``left_out``: those with nothing to learn within max_length."""

    entries: int
    samples: int
    cut: int
    left_out: int
    learned: int
    tokens: int
    longest: int

    def format(self) -> str:
        """In one line of text."""
        return (
            f"{self.entries} entries, {self.samples} samples ({self.cut} cut, {self.left_out} left out), "
            f"{self.learned} of {self.tokens} tokens learned, the longest has {self.longest}"
        )


@dataclass(frozen=True)
class Corpus:
    """All samples as tokens: ``ids`` and ``labels`` int32, sample i at starts[i] : starts[i + 1]."""

    ids: torch.Tensor
    labels: torch.Tensor
    starts: list[int]
    counts: Counts

    @classmethod
    def encode(
        cls,
        tokenizer: ChatTokenizer,
        entries: Sequence[object],
        max_length: int,
        form: FormSettings | None = None,
        max_dropped: float = 1.0,
    ) -> Corpus:
        """Raises RequestError for an entry that makes no sense, and where none, or more than the share ``max_dropped``
        of them, has nothing to learn in its first ``max_length`` tokens."""
        ids: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        cut = left_out = longest = learned = 0
        for number, entry in enumerate(entries, 1):
            place = entries.where(number) if isinstance(entries, Entries) else number
            samples = training_samples(tokenizer, entry, place, form)
            longest = max(longest, *(len(sample.ids) for sample in samples))
            usable = [sample for sample in (s.cut(max_length) for s in samples) if sample.learned]
            cut += any(len(sample.ids) > max_length for sample in samples)
            left_out += not usable
            learned += sum(sample.learned for sample in usable)
            ids += [torch.tensor(sample.ids, dtype=torch.int32) for sample in usable]
            labels += [torch.tensor(sample.labels, dtype=torch.int32) for sample in usable]
        if not ids:
            found = f"none of {len(entries)} entries has anything to learn in its first {max_length} tokens"
            raise RequestError("training data", found, "Give at least one, or a larger max_length.")
        if left_out > max_dropped * len(entries):
            raise RequestError(
                "training data",
                f"{left_out} of {len(entries)} entries have nothing to learn in their first {max_length} tokens",
                f"Give a larger max_length (the longest entry has {longest} tokens), or a larger max_dropped.",
            )
        starts = [0, *accumulate(map(len, ids))]
        counts = Counts(len(entries), len(ids), cut, left_out, learned, starts[-1], longest)
        return cls(torch.cat(ids), torch.cat(labels), starts, counts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, sample: int) -> int:
        return self.starts[sample + 1] - self.starts[sample]

    def learned(self, sample: int) -> int:
        """How many tokens of a sample are predicted and learned."""
        here = slice(self.starts[sample] + 1, self.starts[sample + 1])
        return int((self.labels[here] != IGNORE).sum())

    def batches(self, seed: int, epoch: int, batch_tokens: int) -> list[list[int]]:
        """Sample numbers of each step of an epoch: samples of similar length together, so that many of a step are of
        one length."""
        rng = random.Random(f"{seed}-{epoch}")
        order = list(range(len(self)))
        rng.shuffle(order)
        window = max(256, batch_tokens // 4)
        batches: list[list[int]] = []
        for begin in range(0, len(order), window):
            here = sorted(order[begin : begin + window], key=self.length)
            batches += self.split(here, batch_tokens)
        rng.shuffle(batches)
        return batches

    def split(self, samples: Sequence[int], tokens: int) -> list[list[int]]:
        """The samples, in their order, in groups of at most so many tokens, or of one sample."""
        groups: list[list[int]] = []
        size = 0
        for sample in samples:
            size += self.length(sample)
            if not groups or size > tokens:
                groups.append([])
                size = self.length(sample)
            groups[-1].append(sample)
        return groups

    def take(self, samples: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """ids int64 [T] of the samples one behind the other, targets int64 [T], each token's the label of the next in
        its sample, and the samples' lengths."""
        lengths = [self.length(sample) for sample in samples]
        ids = torch.cat([self.ids[self.starts[s] : self.starts[s + 1]] for s in samples]).long()
        labels = torch.cat([self.labels[self.starts[s] : self.starts[s + 1]] for s in samples]).long()
        targets = torch.full_like(labels, IGNORE)
        targets[:-1] = labels[1:]
        targets[torch.tensor(lengths).cumsum(0) - 1] = IGNORE
        return ids, targets, lengths

    def apart(self, share: float, seed: int) -> tuple[Corpus, Corpus]:
        """(the rest, a random ``share`` of the samples, one at least)."""
        order = list(range(len(self)))
        random.Random(f"{seed}-held-out").shuffle(order)
        count = min(max(1, round(share * len(self))), len(self) - 1)
        if count < 1:
            raise RequestError("holding out a share of the data", "there is one sample", "Give more data.")
        return self._of(sorted(order[count:])), self._of(sorted(order[:count]))

    def _of(self, samples: Sequence[int]) -> Corpus:
        spans = [slice(self.starts[s], self.starts[s + 1]) for s in samples]
        starts = [0, *accumulate(span.stop - span.start for span in spans)]
        ids, labels = (torch.cat([whole[span] for span in spans]) for whole in (self.ids, self.labels))
        return Corpus(ids, labels, starts, self.counts)

    def shown(self, tokenizer: ChatTokenizer, sample: int = 0) -> str:
        """A sample's text, what is learned of it between ⟦ and ⟧."""
        here = slice(self.starts[sample], min(self.starts[sample + 1], self.starts[sample] + _SHOWN_TOKENS))
        text, learning = "", False
        stretch: list[int] = []
        for place, (token, label) in enumerate(
            zip(self.ids[here].tolist(), self.labels[here].tolist(), strict=True)
        ):
            learned = label != IGNORE and place > 0
            if learned is not learning:
                text += tokenizer.decode(stretch) + ("⟦" if learned else "⟧")
                stretch, learning = [], learned
            stretch.append(token)
        return text + tokenizer.decode(stretch) + ("⟧" if learning else "")

    def digest(self) -> str:
        """A fingerprint of all tokens and labels."""
        parts = (self.ids.numpy().tobytes(), self.labels.numpy().tobytes(), repr(self.starts).encode())
        return hashlib.sha256(b"".join(parts)).hexdigest()
