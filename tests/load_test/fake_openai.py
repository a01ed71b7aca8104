"""A server of OpenAI's dialect that behaves as a test says, and not always well."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Reply:
    """The connection of one request, for a behaviour to write to."""

    def __init__(self, server: FakeOpenAI, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.server, self.writer, self.body = server, writer, body
        self.keep = False

    def head(self, status: str, *headers: str) -> None:
        self.writer.write("\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode())

    async def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    def begin(self) -> None:
        self.head("200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked")

    async def end(self) -> None:
        """A body that is complete: the connection stays open for the next request."""
        await self.chunk(b"")
        self.keep = True

    def abort(self) -> None:
        self.writer.transport.abort()


Behaviour = Callable[[Reply], Awaitable[None]]


def event(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"data: {text}\n\n".encode()


def content(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, **more}]}


FINISH = content("", finish_reason="stop")
USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 4}},
}


def streams(*events: Any, cut: int = 0) -> Behaviour:
    """Sends events; with ``cut`` in chunks of so many bytes, wherever that cuts them."""

    async def behave(reply: Reply) -> None:
        reply.begin()
        sent = [event(value) for value in events]
        whole = b"".join(sent)
        for piece in [whole[i : i + cut] for i in range(0, len(whole), cut)] if cut else sent:
            await reply.chunk(piece)
        await reply.end()

    return behave


def paced(first: float, gap: float, tokens: int) -> Behaviour:
    """Sends a role at once, then ``tokens`` events with a token each: after ``first`` seconds, and every ``gap``."""

    async def behave(reply: Reply) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        reply.begin()
        await reply.chunk(event({"choices": [{"delta": {"role": "assistant"}}]}))
        for place in range(tokens):
            await asyncio.sleep(began + first + place * gap - now())
            await reply.chunk(event(content("word ")))
        usage = {"prompt_tokens": 7, "completion_tokens": tokens}
        for last in (FINISH, {"choices": [], "usage": usage}, "[DONE]"):
            await reply.chunk(event(last))
        await reply.end()

    return behave


GOOD = streams(
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    *(content(text) for text in ("one ", "two ", "three")),
    *(FINISH, USAGE, "[DONE]"),
)


def refuses(status: str, body: Any, *headers: str) -> Behaviour:
    async def behave(reply: Reply) -> None:
        raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        reply.head(status, "Content-Type: application/json", f"Content-Length: {len(raw)}", *headers)
        reply.writer.write(raw)
        reply.keep = True

    return behave


async def drops(reply: Reply) -> None:
    reply.begin()
    await reply.chunk(event(content("one ")))
    reply.abort()


async def closes_without_a_word(reply: Reply) -> None:
    reply.abort()


async def never_ends(reply: Reply) -> None:
    reply.begin()
    await reply.chunk(event(content("one ")))
    await asyncio.Event().wait()


async def dies(reply: Reply) -> None:
    """The whole server: nobody listens any more, all connections end."""
    reply.server.die()


class FakeOpenAI:
    """``script``: what the first, second, ... request meets; the last goes on for ever. ``bodies``: what was asked."""

    def __init__(self, script: Sequence[Behaviour]) -> None:
        self.script = list(script)
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.connections = 0
        self.url = ""
        self._writers: set[asyncio.StreamWriter] = set()
        self._listening: asyncio.Server | None = None

    async def listen(self) -> None:
        self._listening = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.url = f"http://127.0.0.1:{self._listening.sockets[0].getsockname()[1]}"

    def die(self) -> None:
        assert self._listening is not None
        self._listening.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        self.heads.append(head)
        length = next(int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:"))
        raw = await reader.readexactly(length)
        if head.startswith("get /v1/models"):
            reply = Reply(self, writer, {})
            await refuses("200 OK", {"data": [{"id": "fake-model"}]})(reply)
            return True
        body = json.loads(raw)
        behave = self.script[min(len(self.bodies), len(self.script) - 1)]
        self.bodies.append(body)
        reply = Reply(self, writer, body)
        await behave(reply)
        return reply.keep


@contextmanager
def fake_openai(*script: Behaviour) -> Iterator[FakeOpenAI]:
    """Such a server in a thread of its own."""
    server, ready, stop = FakeOpenAI(script), threading.Event(), threading.Event()

    async def serve() -> None:
        await server.listen()
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.01)
        server.die()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
