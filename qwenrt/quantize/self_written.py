"""Texts that a model writes to be calibrated on: conversations, both sides of which are its own."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwenrt.errors import RequestError
from qwenrt.llm import LLM
from qwenrt.loading import load
from qwenrt.quantize.settings import QuantizeSettings
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer

_QUESTION = 24  # tokens of what the user is made to say
_LEAST = 16  # room for a question and the beginning of an answer
_TURNS = 8  # at most; a text whose answers are short stays short
_PLAIN = SamplingParams(temperature=0.8, top_p=1.0, top_k=0, repetition_penalty=1.0)
logger = logging.getLogger("qwenrt")


def write_texts(
    source: Path, tokenizer: ChatTokenizer, settings: QuantizeSettings, progress: bool | None = None
) -> list[list[int]]:
    """``settings.samples`` texts of at most ``settings.sample_length`` tokens, at a temperature of 0.8.

    What a user says begins with a token drawn from all of the vocabulary, so that no two texts are alike, and goes on
    as the model likes; then it answers. A base model goes on from such a token.
    """
    logger.info(
        "the model writes %d texts of %d tokens to be calibrated on; calibration= (--calibration FILE) takes your own",
        settings.samples,
        settings.sample_length,
    )
    from tqdm import tqdm

    with load(source, max_model_len=settings.sample_length + 1) as llm:
        frame = _Frame.of(tokenizer) if llm.can_chat else None
        writer = _Writer(llm, tokenizer, settings, frame)
        total = settings.samples * settings.sample_length
        disable = None if progress is None else not progress
        with tqdm(total=total, desc="writing texts", unit="token", disable=disable) as bar:
            return writer.texts(lambda tokens: bar.update(tokens - bar.n))


@dataclass(frozen=True)
class _Frame:
    """The control tokens around what each side says: before the first user, before each answer, before each next
    user."""

    begin: list[int]
    answer: list[int]
    again: list[int]

    @classmethod
    def of(cls, tokenizer: ChatTokenizer) -> _Frame | None:
        """That of the chat format, or None where its turns have no end that is known."""
        ids = tokenizer.encode_chat([{"role": "user", "content": ""}])
        start, end = (tokenizer.special_tokens.get(name) for name in ("<|im_start|>", "<|im_end|>"))
        if start is None or end is None or end not in ids:
            return None
        at = max(place for place, token in enumerate(ids) if token == end)
        newline = tokenizer.encode("\n")
        return cls(ids[:at], ids[at:], [end, *newline, start, *tokenizer.encode("user"), *newline])


class _Writer:
    def __init__(
        self, llm: LLM, tokenizer: ChatTokenizer, settings: QuantizeSettings, frame: _Frame | None
    ) -> None:
        self._llm, self._settings, self._frame = llm, settings, frame
        self._control = set(tokenizer.special_tokens.values())
        self._words = [token for token in range(tokenizer.vocab_size) if token not in self._control]
        self._first = [] if frame is not None else [tokenizer.eod_id]
        self._random = random.Random(settings.seed)
        self._seed = settings.seed

    def texts(self, tell: Callable[[int], object]) -> list[list[int]]:
        """The texts; ``tell`` is told again and again how many tokens there are."""
        length, frame = self._settings.sample_length, self._frame
        texts = [list(frame.begin if frame else self._first) for _ in range(self._settings.samples)]
        if length - len(texts[0]) < _LEAST:
            found = f"sample_length {length}, and a text begins with {len(texts[0])} tokens"
            raise RequestError("calibrating on what the model writes", found, "Use a larger sample_length.")
        if frame is None:
            self._go_on(texts, length, question=True)
            return texts
        for turn in range(_TURNS):
            short = [text for text in texts if length - len(text) >= _LEAST]
            if turn:
                for text in short:
                    text += frame.again
            self._go_on(short, _QUESTION, question=True)
            tell(sum(map(len, texts)))
            for text in short:
                text += frame.answer
            self._go_on([text for text in short if len(text) < length], length, question=False)
            tell(sum(map(len, texts)))
        return [text[:length] for text in texts]

    def _go_on(self, texts: list[list[int]], most: int, *, question: bool) -> None:
        """Each text gets at most ``most`` more tokens: of a question, which begins with a word of its own and holds no
        control token, or of an answer, which ends where the model ends it."""
        if not texts:
            return
        params = []
        for text in texts:
            if question:
                text.append(self._random.choice(self._words))
            self._seed += 1
            room = min(most, self._settings.sample_length - len(text))
            own = _PLAIN.with_(max_tokens=max(1, room), seed=self._seed)
            if question:
                own = own.with_(ignore_eos=True, logit_bias={token: -100.0 for token in self._control})
            params.append(own)
        answers = self._llm.generate(prompt_token_ids=[list(text) for text in texts], sampling_params=params)
        for text, answer in zip(texts, answers, strict=True):
            text += [token for token in answer.token_ids if question or token not in self._control]
