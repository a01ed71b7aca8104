"""One loaded model as the server sees it: what it is called, and from an Ask to its answers."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import qwenrt
from qwenrt.errors import ConfigError, QwenrtError, shown
from qwenrt.files import is_there
from qwenrt.outputs import Delta
from qwenrt.server.admission import Admission, Turn
from qwenrt.server.metrics import Metrics
from qwenrt.server.running import Running
from qwenrt.text.dialects.answers import summed
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.problem import Problem
from qwenrt.text.tokenizer.overlong import Overlong

if TYPE_CHECKING:
    from qwenrt.answering import Prepared
    from qwenrt.llm import LLM
    from qwenrt.sampling_params import SamplingParams
    from qwenrt.server.settings import ServeSettings
    from qwenrt.text.chat.chat_tokenizer import ChatTokenizer

logger = logging.getLogger("qwenrt.server")

T = TypeVar("T")
R = TypeVar("R")
MOST_ENTRIES = 2**18  # logprobs in a body: some 100 MB while it is made
_SHARE = 8192  # characters of texts that are read at once


@dataclass(frozen=True)
class Caller:
    """Whose request it is: an opaque ``name`` of the key it came with, "" without one, and what that key may."""

    name: str = ""
    max_priority: int = 9


@dataclass(frozen=True)
class Arrival:
    """How a request came: its id, the dialect, the id that its answer has for the client, the size of its body."""

    request_id: str
    dialect: str
    answer_id: str
    body_bytes: int


@dataclass(frozen=True)
class Made:
    """A request as the engine takes it. ``max_tokens``: what its limit was cut to, None where it was not."""

    prepared: tuple[Prepared, ...]
    max_tokens: int | None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(one.prompt_token_ids) for one in self.prepared)

    @property
    def choices(self) -> int:
        return sum(one.params.n for one in self.prepared)

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that it asks for."""
        return self.prepared[0].adapter

    @property
    def told(self) -> int:
        """What is told of one token: itself, and its alternatives."""
        return 1 + (self.prepared[0].params.logprobs or 0)


@dataclass
class Service:
    """A model with the queue before it and the figures beside it."""

    llm: LLM
    settings: ServeSettings
    admission: Admission
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    running: dict[str, Running] = field(default_factory=dict)  # by the id that the answer has for its client
    _readers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="qwenrt-server-reads")
    )

    @cached_property
    def own_name(self) -> str:
        """The checkpoint's name; of a directory or file its last part: where it lies is nobody's business."""
        path = Path(self.llm.name)
        if path.is_dir():
            return path.resolve().name
        return path.stem if is_there(path, ConfigError) else self.llm.name

    @property
    def names(self) -> tuple[str, ...]:
        """What the model is served as, its main name first."""
        return self.settings.served_model_names or (self.own_name,)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those that are loaded and can be asked for, as a request names its model."""
        try:
            return tuple(name for name in self.llm.adapters if name not in self.names)
        except QwenrtError:  # it was closed
            return ()

    def adapter_of(self, asked: str) -> str | None:
        """The adapter that a request asks for as its model; None for the model itself. Ollama's clients may put a tag
        behind the name."""
        return next((n for n in (asked, asked.removesuffix(":latest")) if n in self.adapters), None)

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Raises Problem where the model has none."""
        if not self.llm.has_tokenizer:
            raise Problem(
                "not_implemented", f"{self.own_name} has no tokenizer: only token ids go in and out."
            )
        return self.llm.tokenizer

    @property
    def fingerprint(self) -> str:
        """Changes when the same request may have another answer."""
        return f"qwenrt-{qwenrt.__version__}"

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """A token's own text and bytes."""
        if not self.llm.has_tokenizer:
            return "", b""
        raw = self.llm.tokenizer.decode_bytes([token_id])
        return raw.decode("utf-8", "replace"), raw

    def check_name(self, asked: str) -> None:
        """Raises Problem for another model's name, where only this one's are served: so it is where there are adapters,
        as whoever misspells one would take the model's answers for its."""
        adapters = self.adapters
        strict = self.settings.strict_model or adapters or self.settings.adapter_directory is not None
        known = {asked, asked.removesuffix(":latest")} & {*self.names, *adapters}
        if strict and not known:
            served = ", ".join((*self.names, *adapters))
            found = f"The model {asked[:120]!r} is not served here. Served: {served}."
            raise Problem("not_found", found, param="model")

    def check_room(self, dialect: str) -> None:
        """Raises Problem where a request could not even wait."""
        try:
            self.admission.check_room()
        except Problem as problem:
            self.metrics.refused(dialect, problem.kind)
            raise

    async def make(self, ask: Ask, caller: Caller) -> Made:
        """The prompts of a request, rendered and tokenised beside the event loop. Raises Problem."""
        self.check_name(ask.model)
        try:
            return await asyncio.to_thread(self._make, ask, caller)
        except QwenrtError as error:
            raise self.problem_of(error) from error

    async def start(self, made: Made, ask: Ask, caller: Caller, arrival: Arrival) -> Running:
        """Wait for its turn and begin to compute. Raises Problem."""
        if self.settings.log_prompts:
            await asyncio.to_thread(self._log_prompts, made, arrival)
        began = time.monotonic()
        limits = [one.params.max_tokens or self.llm.max_model_len for one in made.prepared]
        expected = self.admission.expected(made.prompt_tokens, max(limits), made.choices)
        priority = min(ask.priority, caller.max_priority)
        try:
            turn = await self.admission.begin(
                caller.name, expected, sequences=made.choices, priority=priority
            )
        except Problem as problem:
            self.metrics.refused(arrival.dialect, problem.kind)
            raise
        self.metrics.begin(arrival.body_bytes)
        self.metrics.queue_wait.observe(turn.waited)
        watched = _Watched(self, arrival, turn, began)
        running = self.running[arrival.answer_id] = Running(caller, watched.seen, watched.ended)
        try:
            await running.begin(self.llm, made.prepared)
        except QwenrtError as error:
            raise self.problem_of(error) from error
        return running

    def stats(self) -> dict[str, Any]:
        """The engine's figures. Raises Problem where it has ended."""
        try:
            return self.llm.stats()
        except QwenrtError as error:
            raise Problem("unavailable", str(error)) from error

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, control tokens shown. Raises Problem."""
        try:
            return self.tokenizer.decode(token_ids)
        except QwenrtError as error:
            raise self.problem_of(error) from error

    async def embed(
        self,
        texts: Sequence[str | list[int]],
        caller: Caller,
        instruction: str | None = None,
        prompt_name: str | None = None,
        truncate: bool | None = None,
    ) -> tuple[list[list[float]], int]:
        """A vector of each text, and how many tokens were read. ``truncate`` as `LLM.embed_counted` has it. Raises
        Problem."""
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                self._check_ids(text, f"input[{i}]")

        def embed(share: list[str | list[int]]) -> tuple[list[list[float]], int]:
            vectors, count = self.llm.embed_counted(share, instruction, prompt_name, truncate=truncate)
            return vectors.tolist(), count

        sizes = [len(text) if isinstance(text, str) else 4 * len(text) for text in texts]
        return await self._read(texts, sizes, embed, caller)

    async def scores(
        self, pairs: Sequence[tuple[str, str]], caller: Caller, instruction: str | None
    ) -> tuple[list[float], int]:
        """How well each document answers its query, and how many tokens were read. Raises Problem."""
        task = () if instruction is None else (instruction,)
        sizes = [len(query) + len(document) for query, document in pairs]
        return await self._read(pairs, sizes, lambda share: self.llm.scores_counted(share, *task), caller)

    def problem_of(self, error: Exception) -> Problem:
        """What went wrong, for the client: with a request, or with an engine that has ended."""
        problem = Problem.of(error)
        if problem.kind == "invalid_request" and self.llm.failure is not None:
            return Problem("unavailable", problem.message)
        return problem

    # ---- inside

    def _log_prompts(self, made: Made, arrival: Arrival) -> None:
        """As one line each: what a stranger wrote begins no line of its own."""
        for one in made.prepared:
            ids = one.prompt_token_ids
            said = self.llm.tokenizer.decode(ids) if self.llm.has_tokenizer else ids
            logger.info("%s prompt: %r", arrival.request_id, said)

    async def _read(
        self,
        texts: Sequence[T],
        sizes: Sequence[int],
        work: Callable[[list[T]], tuple[list[R], int]],
        caller: Caller,
    ) -> tuple[list[R], int]:
        """What ``work`` makes of each text, in its turn and within its time. A share of them at once, in threads of
        their own: who has gone is noticed between two, and nobody's prompt waits for another's thousand texts."""
        loop, end = asyncio.get_running_loop(), time.monotonic() + self.settings.request_timeout
        results: list[R] = []
        async with self.admission.turn(caller.name, 1 + sum(sizes) // 4) as turn:
            for first, last in _shares(sizes):
                if time.monotonic() > end:
                    found = f"{first} of {len(texts)} texts were read in the time that a request may take."
                    raise Problem("timeout", f"{found} Send fewer.")
                try:
                    share = partial(work, list(texts[first:last]))
                    made, count = await loop.run_in_executor(self._readers, share)
                except QwenrtError as error:
                    raise self.problem_of(error) from error
                results += made
                turn.spent += count
        return results, turn.spent

    def _make(self, ask: Ask, caller: Caller) -> Made:
        sampling = dict(ask.sampling)
        asked = sampling.pop("max_tokens", None)
        if caller.name and not self.settings.share_prefixes:
            own = str(sampling.get("cache_salt") or "").encode("utf-8", "surrogatepass")
            sampling["cache_salt"] = f"{caller.name}/{hashlib.sha256(own).hexdigest() if own else ''}"
        sampling["most_prompt_tokens"] = (
            2 * self.llm.max_model_len
        )  # up to there, how many it has is told exactly
        try:
            prepared = self._prepared(ask, sampling)
        except Overlong as error:
            raise Problem.context_length(error.tokens, self.llm.max_model_len, about=True) from error
        longest = max(len(one.prompt_token_ids) for one in prepared)
        room = self.llm.max_model_len - longest
        if room < 1:
            raise Problem.context_length(longest, self.llm.max_model_len)
        most, made = room, Made(tuple(prepared), None)
        if made.told > 1 and not ask.stream:
            most = min(room, max(1, MOST_ENTRIES // (made.told * made.choices)))
        limit = most if asked is None else min(asked, most)
        params = self._limited(prepared[0].params, limit)
        adapter = self.adapter_of(ask.model)
        limited = tuple(replace(one, params=params, adapter=adapter) for one in prepared)
        return Made(limited, limit if limit < (room if asked is None else asked) else None)

    def _prepared(self, ask: Ask, sampling: dict[str, Any]) -> list[Prepared]:
        if ask.messages is None:
            return self._completions(ask.prompts, sampling)
        return [self._chat(ask, sampling)]

    def _chat(self, ask: Ask, sampling: dict[str, Any]) -> Prepared:
        wishes: dict[str, Any] = {}
        if self.llm.thinking == "optional" and ask.enable_thinking is not None:
            wishes["enable_thinking"] = ask.enable_thinking
        if self.llm.thinking != "never" and ask.enable_thinking is not False:
            wishes["thinking_budget"] = ask.thinking_budget
            if ask.reasoning_effort != "none" or self.llm.thinking == "optional":
                wishes["reasoning_effort"] = ask.reasoning_effort
        if ask.tools:
            wishes["tools"] = list(ask.tools)
            wishes["tool_choice"] = ask.tool_choice
            wishes["parallel_tool_calls"] = ask.parallel_tool_calls
        prepared = self.llm.prepare(messages=ask.messages, max_tokens=None, **wishes, **sampling)
        if ask.before:
            self._check_ids(ask.before, "context")
            prepared = replace(prepared, prompt_token_ids=[*ask.before, *prepared.prompt_token_ids])
        return prepared

    def _completions(self, prompts: Sequence[str | list[int]], sampling: dict[str, Any]) -> list[Prepared]:
        """All with the same parameters, which are looked at once."""
        prepared: list[Prepared] = []
        asked: dict[str, Any] = {**sampling, "max_tokens": None}
        for prompt in prompts:
            if isinstance(prompt, str):
                prepared.append(self.llm.prepare(prompt=prompt, **asked))
            else:
                self._check_ids(prompt, "prompt")
                prepared.append(self.llm.prepare(prompt_token_ids=prompt, **asked))
            asked = {"sampling_params": prepared[0].params, "most_prompt_tokens": asked["most_prompt_tokens"]}
        return prepared

    def _check_ids(self, token_ids: Sequence[int], param: str) -> None:
        size = self.llm.config.vocab_size
        for i, token in enumerate(token_ids):
            if not 0 <= token < size:
                found = f"{param}: got the token id {shown(token)}, and this model's go from 0 to {size - 1}."
                raise Problem(
                    "invalid_request", f"{found} Send ids of its own vocabulary.", param=f"{param}[{i}]"
                )

    def _limited(self, params: SamplingParams, limit: int) -> SamplingParams:
        """A minimum of tokens that the context cannot hold is cut as their maximum is; so is the time."""
        asked, most = params.timeout, self.settings.request_timeout
        return params.with_(
            max_tokens=limit,
            min_tokens=min(params.min_tokens, limit),
            timeout=most if asked is None else min(asked, most),
        )


def _shares(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of each share of texts of these sizes."""
    first = size = 0
    for place, one in enumerate(sizes):
        if place > first and size + one > _SHARE:
            yield first, place
            first, size = place, 0
        size += one
    if sizes:
        yield first, len(sizes)


@dataclass
class _Watched:
    """What is counted of one running request, and the end of its turn."""

    service: Service
    arrival: Arrival
    turn: Turn
    began: float
    last: float = 0.0
    ends: list[Delta] = field(default_factory=list)
    said: dict[int, list[str]] = field(default_factory=dict)  # by choice, where it is to be logged

    def seen(self, deltas: Sequence[Delta]) -> None:
        now, metrics = time.monotonic(), self.service.metrics
        if self.last:
            metrics.between_tokens.observe(now - self.last)
        else:
            metrics.first_token.observe(now - self.began)
        self.last = now
        keeps = self.service.settings.log_prompts
        for delta in deltas:
            if delta.finish_reason is not None:
                self.ends.append(delta)
            if keeps:
                calls = (f"{call.name}{call.arguments}" for call in delta.calls)
                self.said.setdefault(delta.index, []).extend((delta.reasoning, delta.text, *calls))

    def ended(self, error: Exception | None) -> None:
        arrival = self.arrival
        self.service.running.pop(arrival.answer_id, None)
        usage = summed([delta.usage for delta in self.ends if delta.usage is not None])
        self.turn.spent = usage.prompt_tokens + usage.completion_tokens
        outcome = "error" if error is not None else "cancelled"
        if error is None and self.ends:
            outcome = self.ends[0].finish_reason or "cancelled"
        seconds, broken = time.monotonic() - self.began, sum(end.broken_calls for end in self.ends)
        self.service.metrics.end(arrival.dialect, outcome, seconds, usage, broken)
        self.service.admission.end(self.turn)
        for index, texts in self.said.items():
            logger.info("%s answer %d: %r", arrival.request_id, index, "".join(texts))
        logger.info(
            "%s %s %s: %d tokens read, %d of them cached, %d written, waited %.3f s of %.3f s",
            *(arrival.request_id, arrival.dialect, outcome, usage.prompt_tokens, usage.cached_tokens),
            *(usage.completion_tokens, self.turn.waited, seconds),
        )
