"""A client of OpenAI's dialect: chats and completions as streams, and when each piece of them came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import h11
import msgspec

from qwenrt.errors import RequestError
from qwenrt.load_test.connections import Address, CouldNotConnect, Exchange, Header, Pool
from qwenrt.load_test.workloads import Request

_LONGEST_ERROR = 2000  # bytes of a body that are read to say what went wrong
_SAID = 300  # characters of it that are kept
_PROBES, _BETWEEN_PROBES_S = 3, 0.5
CONNECT, LOST, TIMEOUT = "could not connect", "connection lost", "timed out"


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer. ``kind``: what failures are counted by, such as "HTTP 429"."""

    kind: str
    said: str

    @property
    def of_connection(self) -> bool:
        """Whether the server may be gone."""
        return self.kind in (CONNECT, LOST)


@dataclass
class Answer:
    """What came back of one request. ``sent``: by the event loop's clock; ``pieces``: seconds from then to each event
    with text; ``seconds``: to the end. Counts of tokens are None where the server did not tell them."""

    request: Request
    sent: float
    pieces: list[float] = field(default_factory=list)
    seconds: float = 0.0
    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    failure: Failure | None = None
    retry_after: float = 0.0


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_EVENT = msgspec.json.Decoder(_Event)


class EventStream:
    """Server-sent events out of pieces of bytes, however they are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the lines that are complete now. An event of these dialects is one line."""
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class OpenAIServer:
    """One server and what is asked of it each time. ``endpoint``: "chat" or "completions". ``extra``: fields of every
    body. ``timeout``: seconds until an answer must be complete."""

    def __init__(
        self,
        address: Address,
        *,
        key: str | None = None,
        model: str = "",
        endpoint: str = "chat",
        extra: Mapping[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        headers: list[Header] = [("authorization", f"Bearer {key}")] if key else []
        self.address, self.model, self.endpoint = address, model, endpoint
        self._pool, self._extra, self._timeout = Pool(address, headers), dict(extra or {}), timeout

    async def models(self) -> list[str]:
        """The names of the models it serves. Raises RequestError where it does not tell."""
        asked = f"the models of {self.address}"
        try:
            exchange = await asyncio.wait_for(self._pool.exchange("GET", "/models"), 30)
            body = await asyncio.wait_for(exchange.body(1 << 20), 30)
            exchange.close()
        except (OSError, asyncio.TimeoutError, h11.RemoteProtocolError) as error:
            raise RequestError(asked, str(error) or TIMEOUT, "Is the server running there?") from None
        if exchange.status != 200:
            remedy = (
                "Give its key (--api-key-file, or OPENAI_API_KEY)."
                if exchange.status in (401, 403)
                else "Give --served-model-name."
            )
            raise RequestError(asked, f"HTTP {exchange.status}: {_error_text(body)}", remedy)
        try:
            return [str(entry["id"]) for entry in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError):
            raise RequestError(
                asked, "its answer is no list of models", "Give --served-model-name."
            ) from None

    async def alive(self) -> bool:
        """Whether it still takes connections, asked _PROBES times."""
        for attempt in range(_PROBES):
            if attempt:
                await asyncio.sleep(_BETWEEN_PROBES_S)
            try:
                (await self._pool.connect()).close()
                return True
            except CouldNotConnect:
                pass
        return False

    async def ask(self, request: Request) -> Answer:
        """Send a request and read its answer. What goes wrong is the answer's ``failure``."""
        clock = asyncio.get_running_loop().time
        answer = Answer(request, clock())
        try:
            await asyncio.wait_for(self._stream(request, answer), self._timeout)
        except CouldNotConnect as error:
            answer.failure = Failure(CONNECT, str(error))
        except (asyncio.TimeoutError, TimeoutError):
            answer.failure = Failure(TIMEOUT, f"no complete answer within {self._timeout:g} s")
        except OSError as error:
            answer.failure = Failure(LOST, str(error.strerror or error))
        except h11.RemoteProtocolError as error:
            answer.failure = Failure(LOST, str(error))
        except msgspec.MsgspecError as error:
            answer.failure = Failure("unreadable event", str(error))
        answer.seconds = clock() - answer.sent
        if answer.failure is None:
            answer.failure = _what_lacks(answer)
        return answer

    def close(self) -> None:
        self._pool.close()

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent."""
        asked: dict[str, Any] = {"model": self.model, "max_tokens": request.new_tokens}
        if self.endpoint == "chat":
            asked["messages"] = list(request.messages)
            if request.tools:
                asked["tools"] = list(request.tools)
        else:
            asked["prompt"] = request.prompt
        return asked | {"stream": True, "stream_options": {"include_usage": True}} | self._extra

    async def _stream(self, request: Request, answer: Answer) -> None:
        route = "/chat/completions" if self.endpoint == "chat" else "/completions"
        exchange = await self._pool.exchange("POST", route, msgspec.json.encode(self.body(request)))
        try:
            if exchange.status != 200:
                said = _error_text(await exchange.body(_LONGEST_ERROR))
                answer.failure = Failure(f"HTTP {exchange.status}", said)
                answer.retry_after = _seconds(exchange.headers.get("retry-after", ""))
            elif "json" in exchange.headers.get("content-type", ""):
                said = _error_text(await exchange.body(_LONGEST_ERROR))
                answer.failure = Failure("not a stream", said)
            else:
                await self._read(exchange, answer)
        finally:
            exchange.close()

    async def _read(self, exchange: Exchange, answer: Answer) -> None:
        """The events of a stream, to its end."""
        clock, events = asyncio.get_running_loop().time, EventStream()
        calls: dict[int, dict[str, Any]] = {}
        async for piece in exchange.pieces():
            now = clock() - answer.sent
            for data in events.feed(piece):
                if data == b"[DONE]":
                    answer.finished = True
                elif data:
                    _take(_EVENT.decode(data), answer, calls, now)
        answer.calls = [calls[index] for index in sorted(calls)]


def _take(event: _Event, answer: Answer, calls: dict[int, dict[str, Any]], now: float) -> None:
    """What one event says, which came ``now`` seconds after the request."""
    if event.error is not None:
        said = event.error.get("message") if isinstance(event.error, dict) else event.error
        answer.failure = Failure("error in the stream", str(said)[:_SAID])
    if event.usage is not None:
        answer.prompt_tokens = event.usage.prompt_tokens
        answer.output_tokens = event.usage.completion_tokens
        details = event.usage.prompt_tokens_details
        answer.cached_tokens = details.cached_tokens if details is not None else None
    if not event.choices:
        return
    choice = event.choices[0]
    answer.finished = answer.finished or choice.finish_reason is not None
    delta = choice.delta or _Delta()
    text, thought = delta.content or choice.text or "", delta.reasoning_content or delta.reasoning or ""
    answer.text += text
    answer.reasoning += thought
    for call in delta.tool_calls or ():
        _add(call, calls)
    if text or thought or delta.tool_calls:
        answer.pieces.append(now)


def _add(piece: _Call, calls: dict[int, dict[str, Any]]) -> None:
    empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
    call = calls.setdefault(piece.index, empty)
    call["id"] = piece.id or call["id"]
    if piece.function is not None:
        call["function"]["name"] += piece.function.name or ""
        call["function"]["arguments"] += piece.function.arguments or ""


def _what_lacks(answer: Answer) -> Failure | None:
    if not answer.finished:
        return Failure("cut off", f"the stream ended after {len(answer.pieces)} events without saying so")
    if not answer.pieces:
        return Failure("no text", "the answer is empty")
    return None


def _error_text(body: bytes) -> str:
    """What a body of an error says, in whatever form."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        found = found.get("error", found.get("message", found.get("detail", found)))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:_SAID]


def _seconds(header: str) -> float:
    return float(header) if header.isdecimal() else 0.0
