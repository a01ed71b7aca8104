"""From a request that asks for text to its response: read, render, wait for a turn, write."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.types import ASGIApp

from qwenrt.server.kept_streams import About, KeptStreams
from qwenrt.server.running import Running
from qwenrt.server.service import Made, Service
from qwenrt.server.streams import Client, Json, Streaming, events
from qwenrt.text.dialects.answers import Served, Writer
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.problem import Problem

logger = logging.getLogger("qwenrt.server")

LARGE_BODY = 65536  # bytes; reading more takes long enough to be done beside the event loop
CONVERSATION = "x-conversation-id"


@dataclass(frozen=True)
class Endpoint:
    """One route at which something is written. ``read``: from a body and its headers to an Ask, raises Problem;
    ``writer``: of its answers. ``finished`` sees the answers to a request, for dialects that keep them."""

    dialect: str
    read: Callable[[bytes, Mapping[str, str]], Ask]
    writer: Callable[[Ask, Served], Writer]


class Writing:
    """Answers the requests of all endpoints."""

    def __init__(self, service: Service) -> None:
        self.service, self.kept = service, KeptStreams()

    async def answer(self, endpoint: Endpoint, request: Request) -> ASGIApp:
        """The response to a request. Raises Problem for what is wrong before anything was sent."""
        body = await request.body()
        caller = request.scope["state"]["caller"]
        read = partial(endpoint.read, body, request.headers)
        ask = await asyncio.to_thread(read) if len(body) > LARGE_BODY else read()
        client = Client(request.receive)
        try:
            made = await client.unless_gone(self.service.make(ask, caller))
            writer = endpoint.writer(ask, self._served(made, request))
            start = self.service.start(made, ask, caller, endpoint.dialect, writer.answer_id)
            running = await client.unless_gone(start)
        except BaseException:
            client.close()
            raise
        headers = _headers(ask, made)
        if ask.stream:
            return await self._stream(client, running, writer, headers, request)
        try:
            choices = await client.unless_gone(running.whole())
        finally:
            client.close()
        if all(choice.finish_reason == "timeout" and not choice.token_ids for choice in choices):
            raise Problem(
                "timeout", "The request reached its deadline before its first token. Allow it more time."
            )
        return Json(writer.whole(choices), headers=headers)

    def _served(self, made: Made, request: Request) -> Served:
        llm = self.service.llm
        return Served(
            self.service.names[0],
            request.scope["state"]["request_id"],
            made.prompt_tokens,
            prompt_ids=[one.prompt_token_ids for one in made.prepared],
            token_bytes=None if llm.tokenizer is None else llm.tokenizer.token_bytes,
        )

    async def _stream(
        self, client: Client, running: Running, writer: Writer, headers: dict[str, str], request: Request
    ) -> ASGIApp:
        source = events(running, writer, problem_of)
        conversation = request.headers.get(CONVERSATION)
        if conversation is None:
            return Streaming(client, source, writer.media_type, writer.ping, headers, running.cancel)
        about = About(writer.media_type, headers)
        try:
            stream = self.kept.keep(
                request.scope["state"]["caller"], conversation, source, about, running.cancel
            )
        except Problem:
            client.close()
            await running.close()
            raise
        return Streaming(client, stream.read(0), writer.media_type, writer.ping, headers, _nothing)


def problem_of(error: Exception) -> Problem:
    """What went wrong, for the client; what nobody foresaw is in the log as well."""
    problem = Problem.of(error)
    if problem.kind == "internal":
        logger.error("a request failed", exc_info=error)
    return problem


def _headers(ask: Ask, made: Made) -> dict[str, str]:
    headers = {}
    if made.max_tokens is not None:
        headers["x-qwenrt-max-tokens"] = str(made.max_tokens)
    if ask.ignored:
        names = [name.encode("ascii", "backslashreplace").decode() for name in ask.ignored[:32]]
        headers["x-qwenrt-ignored"] = ", ".join(name[:64] for name in names)
    return headers


def _nothing() -> None:
    """A stream that is kept goes on when its client hangs up."""
