"""What a caller may ask of one generation. Validated when built, so nothing bad reaches the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from qwenrt.arguments import as_integer, as_list, as_number, flag
from qwenrt.errors import RequestError, shown
from qwenrt.other_names import says_right_names, unknown_keyword
from qwenrt.structure import Grammar

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 64
MAX_N = 64
MAX_LOGIT_BIAS = 4096
_INT64 = 2**63
_LONGEST_TIMEOUT = 30 * 24 * 3600.0  # seconds


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    temperature: 0 is greedy; larger is more random.
    top_k: keep the k likeliest tokens (0 keeps all). top_p: keep the smallest set whose probability
    reaches top_p. min_p: keep tokens at least min_p times as likely as the likeliest.
    repetition_penalty: divides the logits of tokens in prompt or output (1 is off).
    presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once and per
    occurrence. logit_bias: token id -> added to its logit.
    seed: the same seed gives the same tokens whatever else is in the batch; None draws one.
    n: how many completions. logprobs: how many alternatives to report per token (None reports none).
    stop: strings that end the text and are cut from it. In a chat that is the answer: what a thought or a call of a
    tool says ends nothing, unless include_reasoning_in_stop searches in all that is written, tags included (as it
    always is in a completion, and for Qwen-1's ReAct). One that is a control token ends it by its id.
    stop_token_ids: ids that end it, wherever they are drawn.
    max_tokens: None lets the text run to the end of the context. min_tokens: no stop before that many.
    ignore_eos: go on past the end-of-text tokens.
    grammar: what the answer must be, as a `qwenrt.Grammar`; a thought before it is free.
    timeout: seconds from its arrival after which it ends as it is, with finish_reason "timeout".
    cache_salt: prompts share computed beginnings only with those of the same salt.
    draft: "lookup" guesses tokens from what was written before and checks several in one step: the same tokens, sooner
    where a text repeats itself.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int | None = 512
    min_tokens: int = 0
    ignore_eos: bool = False
    include_reasoning_in_stop: bool = False
    grammar: Grammar | None = None
    timeout: float | None = None
    cache_salt: str = ""
    draft: str | None = None

    def __post_init__(self) -> None:
        self._number("temperature", 0, 100)
        self._integer("top_k", 0, _INT64)
        self._number("top_p", 0, 1, low_open=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0, 100, low_open=True)
        self._number("presence_penalty", -100, 100)
        self._number("frequency_penalty", -100, 100)
        self._integer("n", 1, MAX_N)
        self._integer("min_tokens", 0, _INT64)
        if self.seed is not None:
            self._integer("seed", -_INT64, _INT64 - 1)
        if self.logprobs is not None:
            self._integer("logprobs", 0, MAX_LOGPROBS)
        if self.max_tokens is not None:
            self._integer("max_tokens", 1, _INT64)
            if self.min_tokens > self.max_tokens:
                raise _bad("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        for name in ("ignore_eos", "include_reasoning_in_stop"):
            object.__setattr__(self, name, flag(f"sampling parameter {name}", getattr(self, name)))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise _bad("grammar", self.grammar, "a qwenrt.Grammar, such as Grammar.json_schema({...})")
        if self.timeout is not None:
            self._number("timeout", 0, _LONGEST_TIMEOUT, low_open=True)
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_STOP_CHARS:
            raise _bad("cache_salt", self.cache_salt, f"a text of at most {MAX_STOP_CHARS} characters")
        if self.draft not in (None, "lookup"):
            raise _bad("draft", self.draft, 'None or "lookup"')
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed; an unknown name is an error that lists the known ones."""
        known = {f.name for f in fields(self)}
        for name in changes:
            if name not in known:
                raise unknown_keyword(f"sampling parameter {name!r}", name, known)
        return replace(self, **changes)

    def _number(self, name: str, low: float, high: float, *, low_open: bool = False) -> None:
        given = getattr(self, name)
        value = as_number(given)
        if value is None or not low <= value <= high or (low_open and value == low):
            bracket = "(" if low_open else "["
            raise _bad(name, given, f"a number in {bracket}{low:g}, {high:g}]")
        if not isinstance(given, (int, float)):
            object.__setattr__(self, name, value)

    def _integer(self, name: str, low: int, high: int) -> None:
        given = getattr(self, name)
        value = as_integer(given)
        if value is None or not low <= value <= high:
            upper = "" if high >= _INT64 - 1 else f" and <= {high}"
            raise _bad(name, given, f"an integer >= {low}{upper}")
        object.__setattr__(self, name, value)


SamplingParams.__init__ = says_right_names(SamplingParams.__init__)  # type: ignore[method-assign,assignment]


class SamplingChanges(TypedDict, total=False):
    """The fields of SamplingParams as keywords of chat, stream and generate: single ones are changed."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    n: int
    logprobs: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    include_reasoning_in_stop: bool
    grammar: Grammar | None
    timeout: float | None
    cache_salt: str
    draft: str | None


def _bad(name: str, value: object, wanted: str) -> RequestError:
    return RequestError(f"sampling parameter {name}", f"got {shown(value)}", f"It must be {wanted}.")


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if strings is None:
        return ()
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise _bad("stop", stop, "a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise _bad("stop", f"{len(strings)} strings", f"at most {MAX_STOP_STRINGS} strings")
    for s in strings:
        if not isinstance(s, str) or not 0 < len(s) <= MAX_STOP_CHARS:
            raise _bad("stop", s, f"strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(strings))


def _stop_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    ids = list(ids) if isinstance(ids, Set) else as_list("sampling parameter stop_token_ids", ids)
    if len(ids) > MAX_STOP_CHARS:
        raise _bad("stop_token_ids", ids, f"a list of at most {MAX_STOP_CHARS} token ids")
    return tuple(dict.fromkeys(_token_id("stop_token_ids", i, "token ids >= 0") for i in ids))


def _token_id(name: str, given: object, wanted: str) -> int:
    value = as_integer(given)
    if value is None or value < 0:
        raise _bad(name, given, wanted)
    return value


def _logit_bias(bias: object) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping) or len(bias) > MAX_LOGIT_BIAS:
        raise _bad("logit_bias", bias, f"a mapping of at most {MAX_LOGIT_BIAS} token ids to numbers")
    checked: dict[int, float] = {}
    for key, given in bias.items():
        value = as_number(given)
        if value is None or not -100 <= value <= 100:
            raise _bad("logit_bias", given, "numbers in [-100, 100]")
        checked[_token_id("logit_bias", key, "keyed by token ids >= 0")] = value
    return checked or None
