"""POST /v1/completions: prompts, as texts or token ids, that are continued."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from qwenrt.outputs import Delta, FinishReason, Generation, TokenLogprob
from qwenrt.text.dialects import decoding
from qwenrt.text.dialects.answers import Served
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.decoding import at_most, bad, said
from qwenrt.text.dialects.logprobs import LEAST
from qwenrt.text.dialects.openai_bodies import FINISH, Frame, best, ended
from qwenrt.text.dialects.openai_bodies import error_body as error_body
from qwenrt.text.dialects.openai_fields import (
    MAX_PROMPTS,
    Fields,
    Flag,
    Text,
    Whole,
    priority_of,
    sampling_of,
    wishes_of,
)

_FINISH: dict[FinishReason, str] = {**FINISH, "tool_calls": "stop"}  # a completion calls nothing

TextsOrIds = str | list[str | int | list[int]]


class CompletionRequest(Fields, kw_only=True):
    """The body of POST /v1/completions."""

    model: str
    prompt: TextsOrIds
    suffix: Text = UNSET
    echo: Flag = UNSET
    logprobs: Whole | bool = UNSET


def decode(body: bytes) -> CompletionRequest:
    """The request in a body. Raises Problem."""
    return decoding.decode(body, CompletionRequest)


def read(request: CompletionRequest) -> Ask:
    """What it asks for; ``extra`` is the Wishes that CompletionWriter needs. Raises Problem."""
    if said(request.suffix):
        raise bad("suffix", "text to put after the completion", "This model only continues; leave it out.")
    prompts = texts_or_ids(request.prompt, "prompt", MAX_PROMPTS)
    logprobs, echo = _logprobs(request), request.echo is True
    if echo and logprobs is not None:
        found = "both it and echo"
        raise bad("logprobs", found, "A prompt's own probabilities are not told: leave out one of the two.")
    wishes = wishes_of(request, logprobs, prompts=len(prompts), echo=echo)
    return Ask(
        model=request.model,
        prompts=prompts,
        sampling=sampling_of(request, wishes, "logprobs"),
        stream=request.stream is True,
        include_usage=wishes.usage,
        priority=priority_of(request),
        progress=request.return_progress is True,
        extra=wishes,
    )


def texts_or_ids(given: TextsOrIds, param: str, most: int) -> list[str | list[int]]:
    """One text, texts, the ids of one text, or those of several -> each a text or its ids. Raises Problem."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise bad(param, "it is empty", "Send a text, or token ids.")
    if isinstance(given[0], int):
        return [_ids(given, param)]
    at_most(param, given, most)
    several: list[str | list[int]] = []
    for i, one in enumerate(given):
        if type(one) is not type(given[0]):
            raise bad(f"{param}[{i}]", "another type than before it", "Send texts, or lists of token ids.")
        several.append(one if isinstance(one, str) else _ids(one, f"{param}[{i}]"))
    return several


def _ids(given: object, param: str) -> list[int]:
    assert isinstance(given, list)
    if not given:
        raise bad(param, "it is empty", "Send at least one token id.")
    for i, token in enumerate(given):
        if not isinstance(token, int) or not 0 <= token < 2**31:
            raise bad(f"{param}[{i}]", "it is no token id", "Token ids are integers from 0.")
    return given


def _logprobs(request: CompletionRequest) -> int | None:
    asked = said(request.logprobs)
    if isinstance(asked, bool):
        return 0 if asked else None
    return asked


class CompletionWriter(Frame):
    """A Writer, see answers.py."""

    def __init__(self, served: Served, ask: Ask) -> None:
        self._prompts = len(ask.prompts)
        super().__init__(served, ask.extra, "text_completion", "text_completion", "cmpl-")
        self._logprobs: dict[int, _Logprobs] = {}

    def begin(self) -> bytes:
        """The prompts, where they are to be repeated."""
        if not self._wishes.echo:
            return b""
        choices = range(self._prompts * self._wishes.choices)
        return b"".join(self.chunk(_choice(index, self._echo(index), None)) for index in choices)

    def push(self, delta: Delta) -> bytes:
        self.count(delta.index, len(delta.token_ids), delta.usage, delta.timing)
        logprobs = self._told(delta.index, delta.logprobs)
        if not delta.text and logprobs is None and delta.finish_reason is None:
            return b""
        choice = _choice(delta.index, delta.text, logprobs)
        if delta.finish_reason is not None:
            ended(choice, delta.finish_reason, _FINISH)
        return self.chunk(choice)

    def whole(self, choices: Sequence[Generation]) -> dict[str, Any]:
        given = []
        for index, one in best(choices, self._wishes):
            choice = _choice(index, self._echo(index) + one.text, self._told(index, one.logprobs))
            ended(choice, one.finish_reason, _FINISH)
            given.append(choice)
        return self.body(given, choices)

    def _echo(self, index: int) -> str:
        return self._served.prompts[index // self._wishes.choices] if self._wishes.echo else ""

    def _told(self, index: int, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if not logprobs or self._wishes.logprobs is None:
            return None
        if index not in self._logprobs:
            self._logprobs[index] = _Logprobs(self._served, len(self._echo(index)))
        return self._logprobs[index].push(logprobs)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}


class _Logprobs:
    """The older form of log-probabilities, four lists, of one choice; offsets count from the beginning of its text."""

    def __init__(self, served: Served, offset: int) -> None:
        self._token_text = served.token_text or (lambda token: ("", b""))
        self._offset = offset
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")  # tokens may be parts of one

    def push(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in logprobs:
            text, raw = self._token_text(entry.token_id)
            told["tokens"].append(text)
            told["token_logprobs"].append(max(entry.logprob, LEAST))
            told["top_logprobs"].append(self._alternatives(entry))
            told["text_offset"].append(self._offset)
            self._offset += len(self._characters.decode(raw))
        return told

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """By their texts, the chosen one among them; of two with the same text the likelier."""
        found: dict[str, float] = {}
        for token, logprob in {entry.token_id: entry.logprob, **entry.top}.items():
            text = self._token_text(token)[0]
            found[text] = max(logprob, found.get(text, LEAST))
        return dict(sorted(found.items(), key=lambda item: -item[1]))
