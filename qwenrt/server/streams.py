"""Answers on their way out: whole, as a stream on one connection, or as a stream that outlives its connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope, Send

from qwenrt.server.running import Running
from qwenrt.text.dialects.answers import Writer, json_bytes
from qwenrt.text.dialects.problem import Problem

T = TypeVar("T")

PING_SECONDS = 15.0  # of silence, after which a stream shows that it lives
PROGRESS_SECONDS = 0.5  # between two looks at how far a prompt is
STREAM_HEADERS = ((b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"))


async def events(
    running: Running, writer: Writer, problem_of: Callable[[Exception], Problem], tells_progress: bool = False
) -> AsyncIterator[bytes]:
    """The stream of an answer in its dialect. It always has an end: of all choices, or the event of an error.

    tells_progress: how far the prompt is computed is told until the first token comes, where the dialect can say so.
    """
    try:
        yield writer.begin()
        if tells_progress and hasattr(writer, "progress"):
            async for data in _progress(running, writer.progress):
                yield data
        while deltas := await running.batch():
            data = b"".join([writer.push(delta) for delta in deltas])
            if data:
                yield data
        yield writer.end()
    except Exception as error:
        yield writer.fail(problem_of(error))
    finally:
        running.close()


async def _progress(running: Running, tell: Callable[[int, int, int, float], bytes]) -> AsyncIterator[bytes]:
    """Once each PROGRESS_SECONDS how far the prompt is, where that has changed, and all of it at the end."""
    clock = asyncio.get_running_loop().time
    began, cached, done, total = clock(), 0, -1, running.prompt_tokens
    while not await running.begins(PROGRESS_SECONDS):
        now = running.progress()
        if now is not None and now.done > done:
            cached, done = now.cached, now.done
            yield tell(total, cached, done, clock() - began)
    now = running.progress()
    yield tell(total, cached if now is None else now.cached, total, clock() - began)


def _nothing() -> None:
    """Where nobody has to be told."""


class ClientGone(Exception):
    """The client hung up: there is nobody to answer."""


class Client:
    """The other end of a request whose body was read: whether it is still there."""

    def __init__(self, receive: Receive) -> None:
        self.gone = asyncio.ensure_future(_hung_up(receive))

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``; ClientGone, and the work cancelled, where the client hangs up before."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait([task, self.gone], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.done():
            return task.result()
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
        raise ClientGone

    def close(self) -> None:
        """It is not watched any more."""
        self.gone.cancel()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work`` for a request whose body was read. Raises ClientGone."""
    client = Client(receive)
    try:
        return await client.unless_gone(work)
    finally:
        client.close()


class Streaming:
    """An ASGI response that sends what ``source`` gives, and pings while that gives nothing, unless ``ping`` is None.

    ``gone`` is called when the client hangs up before the end: then nothing more is read. ``over`` is called when
    nothing more is sent, for whatever reason, also where nothing of the source was read at all.
    """

    def __init__(
        self,
        client: Client,
        source: AsyncIterator[bytes],
        media_type: str,
        ping: Callable[[], bytes] | None,
        headers: dict[str, str],
        gone: Callable[[], None] = _nothing,
        over: Callable[[], None] = _nothing,
    ) -> None:
        self._client, self._source, self._ping = client, source, ping
        self._gone, self._over = gone, over
        self._headers = [
            (b"content-type", media_type.encode()),
            *STREAM_HEADERS,
            *((name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = self._client.gone
        watch.add_done_callback(self._hung_up)
        pings = _Pings(send, self._ping)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            async for data in self._source:
                if watch.done():
                    break
                await pings.send(data)
            else:
                await pings.close()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.remove_done_callback(self._hung_up)
            self._client.close()
            self._over()
            await pings.close()
            close = getattr(self._source, "aclose", None)
            if close is not None:
                with suppress(RuntimeError):
                    await close()

    def _hung_up(self, watch: asyncio.Future[None]) -> None:
        if not watch.cancelled():
            self._gone()


async def _hung_up(receive: Receive) -> None:
    """Returns when the client has closed its end, or sends what no request has behind its body."""
    with suppress(Exception):
        while (await receive())["type"] != "http.disconnect":
            pass


class _Pings:
    """What is sent on one stream, with a ping where that was nothing for PING_SECONDS."""

    def __init__(self, send: Send, ping: Callable[[], bytes] | None) -> None:
        self._send, self._ping = send, ping
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        if ping is not None:
            self._timer = self._loop.call_later(PING_SECONDS, self._due)
        self._task: asyncio.Task[None] | None = None

    async def send(self, data: bytes) -> None:
        self._busy = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._last, self._busy = self._loop.time(), False

    def _due(self) -> None:
        silent = self._loop.time() - self._last
        if silent >= PING_SECONDS and not self._busy and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._send_ping())
            silent = 0.0
        self._timer = self._loop.call_later(max(0.01, PING_SECONDS - silent), self._due)

    async def _send_ping(self) -> None:
        assert self._ping is not None
        with suppress(OSError):
            await self.send(self._ping())

    async def close(self) -> None:
        """No ping comes any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None


async def json_beside(make: Callable[[], Any], headers: dict[str, str] | None = None) -> Json:
    """A response whose body takes long to make and to encode: that is done beside the event loop."""
    return await asyncio.to_thread(lambda: Json(make(), headers=headers))


class Json:
    """An ASGI response with a JSON body."""

    def __init__(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.body, self.status = json_bytes(value), status
        self.headers = headers or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status,
                "headers": [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(self.body)).encode()),
                    *((k.encode(), v.encode("latin-1", "replace")) for k, v in self.headers.items()),
                ],
            }
        )
        body: Message = {"type": "http.response.body", "body": self.body}
        await send(body)
